"""Any table with a column that says which task a row is of: CSV or parquet, classification or regression.

Without a file there is a table of our own making, called ``synthetic-drift``: the same smooth function of eight numbers
in five tasks, whose inputs lie in five places. No measurement of anything is in it.

Convention: a table of d numbers is images [N, d, 1, 1] in float32. Columns of text become a column of zeros and ones
for each of their values. Tasks are in the order in which they are met; a fifth of each task's rows, drawn once for all
runs, are the test part. All numbers are normalised by the training rows of all tasks.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adapters.benchmarks.huggingface import rows_of_file
from became_core.continual.data import Dataset
from became_core.continual.rng import random_generator
from became_core.curvature import Categorical, Gaussian, Likelihood
from became_core.errors import BecameError
from became_core.registry import Setting

__all__ = ["TABULAR_SETTINGS", "load_tabular"]

Kind = Literal["auto", "classes", "numbers"]

TABULAR_SETTINGS = {
    "task_column": Setting(
        "task_column", str, "task", "the column of the table that says which task a row is of", ("tabular",)
    ),
    "target_column": Setting(
        "target_column", str, "target", "the column of the table that is to be predicted", ("tabular",)
    ),
    "target_kind": Setting(
        "target_kind",
        Kind,
        "auto",
        "whether targets are classes or numbers (regression, with a Gaussian likelihood); auto takes text and at most "
        "20 different whole numbers for classes",
        ("tabular",),
    ),
    "head": Setting(
        "head",
        Literal["shared", "own"],
        "shared",
        "whether all tasks share a head (domain-incremental) or each has its own",
        ("tabular",),
    ),
}

_TEST_FRACTION = 0.2
# A column is shifted before it is stored in float32 if its mean is more than so many standard deviations from 0.
_FAR = 1000.0
_MOST_CLASSES = 20
_MOST_VALUES = 1000  # of a column of text

Table = dict[str, list[Any]]
Numbers = NDArray[np.float64]


def load_tabular(
    data_dir: Path | None,
    *,
    task_column: str = "task",
    target_column: str = "target",
    target_kind: Kind = "auto",
    head: str = "shared",  # noqa: ARG001 # it is for the stream
) -> Dataset:
    """Return rows of a table, of which a column is predicted: numbers [N, d, 1, 1], with a target and a domain each.

    Args:
        data_dir: a file ``.csv`` or ``.parquet``, or a folder that holds one such file; None for the table of our own
            making.
        task_column: the name of the column that says which task a row is of.
        target_column: the name of the column that is to be predicted.
        target_kind: whether targets are classes or numbers; "auto" looks at them.
        head: of no use here.

    Raises:
        BecameError: if there is no such file or column, a cell is empty or not finite, or a task has too few rows.
    """
    file = None if data_dir is None else _file(data_dir)
    name = "synthetic-drift" if file is None else file.stem
    columns = _drift(task_column, target_column) if file is None else _read(file)
    for column in (task_column, target_column):
        if column not in columns:
            raise BecameError(f"{name} has no column '{column}'; its columns are {', '.join(columns)}.")
    inputs = [column for column in columns if column not in (task_column, target_column)]
    if not inputs:
        raise BecameError(f"{name} has no column besides '{task_column}' and '{target_column}' to predict from.")
    features = np.concatenate([_features(name, column, columns[column]) for column in inputs], axis=1)
    labels, likelihood = _targets(name, target_column, columns[target_column], target_kind)
    named = columns[task_column]
    tasks = ["" if isinstance(value, float) and math.isnan(value) else str(value).strip() for value in named]
    if "" in tasks or "None" in tasks:
        raise BecameError(f"{name} has a row without a task; fill the column '{task_column}' or leave the row out.")
    names = list(dict.fromkeys(tasks))
    domains = np.array([names.index(task) for task in tasks], dtype=np.int64)
    test = np.zeros(len(domains), dtype=bool)
    for number, task in enumerate(names):
        rows = np.flatnonzero(domains == number)
        if len(rows) < 2:
            raise BecameError(
                f"the task '{task}' of {name} has a single row; give at least one to learn and one to test."
            )
        drawn = random_generator(0, "tabular split", number).permutation(rows)
        test[drawn[: max(1, round(_TEST_FRACTION * len(rows)))]] = True
    order = np.concatenate([np.flatnonzero(~test), np.flatnonzero(test)])
    train = features[~test]
    # Sums round, so a constant column is told by its values: nothing is left of it.
    constant = train.min(axis=0) == train.max(axis=0)
    mean, std = np.where(constant, train[0], train.mean(axis=0)), np.where(constant, 1.0, train.std(axis=0))
    # Dates, for example, are so far from 0 that float32 has few digits left for how they differ.
    shift = np.where(~constant & (np.abs(mean) > _FAR * std), mean, 0.0)
    return Dataset(
        name=name,
        images=(features - shift)[order][:, :, None, None].astype(np.float32),
        labels=labels[order],
        train_size=int((~test).sum()),
        mean=tuple((mean - shift).tolist()),
        std=tuple(std.tolist()),
        likelihood=likelihood,
        domains=domains[order],
    )


def _file(path: Path) -> Path:
    """Return the table that a path names."""
    if path.is_dir():
        tables = sorted(file for file in path.iterdir() if file.suffix in (".csv", ".parquet"))
        if len(tables) != 1:
            raise BecameError(f"{path} holds {len(tables)} tables, .csv or .parquet; name the one to learn.")
        return tables[0]
    if not path.is_file():
        raise BecameError(f"there is no file {path}; give a table, .csv or .parquet.")
    return path


def _read(file: Path) -> Table:
    """Return the columns of a file by name."""
    if file.suffix == ".parquet":
        rows = rows_of_file(file)
        return {column: list(rows[column]) for column in rows.column_names}
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:  # some programs write a mark before the first name
            rows = _numbered(text)
    except UnicodeDecodeError as error:
        raise BecameError(
            f"{file} holds bytes that are no UTF-8, the first at {error.start}; save it as UTF-8."
        ) from None
    except (OSError, csv.Error) as error:
        raise BecameError(f"{file} cannot be read as CSV ({error}).") from None
    if len(rows) < 2:
        raise BecameError(f"{file} holds no rows; give a line of names and then a line a row.")
    (_, heads), *rows = rows
    for head in heads:
        if heads.count(head) > 1:
            raise BecameError(f"{file} has {heads.count(head)} columns of the name '{head}'; give each its own.")
    for number, row in rows:
        if len(row) != len(heads):
            raise BecameError(f"line {number} of {file} has {len(row)} cells, and the first line {len(heads)} names.")
    return {head: [row[place] for _, row in rows] for place, head in enumerate(heads)}


def _numbered(text: Iterable[str]) -> list[tuple[int, list[str]]]:
    """Return the rows of CSV that are not blank, each with the number of the line that it begins on."""
    reader, rows, begins = csv.reader(text), [], 1
    for row in reader:
        if row:
            rows.append((begins, row))
        begins = reader.line_num + 1
    return rows


def _features(name: str, column: str, cells: Sequence[Any]) -> Numbers:
    """Return a column as numbers [N, 1], or of text as [N, values] zeros and ones."""
    numbers = _numbers(name, column, cells)
    if numbers is not None:
        return numbers[:, None]
    others = [row for row, cell in enumerate(cells, start=1) if not _is_number(cell)]
    if 2 * len(others) < len(cells):
        raise BecameError(
            f"row {others[0]} of {name} has '{cells[others[0] - 1]}' in the column '{column}', whose other cells are "
            "mostly numbers; give a number, with a point and no other mark in it, or leave the row out."
        )
    texts = np.array([str(cell).strip() for cell in cells])
    values = np.unique(texts)
    if len(values) > _MOST_VALUES:
        raise BecameError(
            f"the column '{column}' of {name} has {len(values):,} different texts, and each would be an input; leave "
            f"the column out, give numbers, or at most {_MOST_VALUES:,} texts."
        )
    ones: Numbers = (texts[:, None] == values[None, :]).astype(np.float64)
    return ones


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _numbers(name: str, column: str, cells: Sequence[Any]) -> Numbers | None:
    """Return cells as numbers; None if they are text."""
    for row, cell in enumerate(cells, start=1):
        if cell is None or str(cell).strip() == "":
            raise BecameError(
                f"row {row} of {name} has nothing in the column '{column}'; fill it, or leave the row out."
            )
    try:
        numbers = np.array([float(cell) for cell in cells])
    except (TypeError, ValueError):
        return None
    if not np.isfinite(numbers).all():
        row = int(np.argmin(np.isfinite(numbers))) + 1
        raise BecameError(f"row {row} of {name} has {cells[row - 1]} in the column '{column}'; give finite numbers.")
    return numbers


def _targets(name: str, column: str, cells: Sequence[Any], kind: Kind) -> tuple[NDArray[Any], Likelihood]:
    """Return the targets and their likelihood."""
    numbers = _numbers(name, column, cells)
    values: NDArray[Any] = np.array([str(cell).strip() for cell in cells]) if numbers is None else numbers
    classes, labels = np.unique(values, return_inverse=True)
    whole = numbers is None or (len(classes) <= _MOST_CLASSES and bool((numbers == np.round(numbers)).all()))
    if kind == "numbers" or (kind == "auto" and not whole):
        if numbers is None:
            raise BecameError(f"the column '{column}' of {name} holds text; it is no target for regression.")
        return numbers[:, None], Gaussian(noise=1.0)
    if len(classes) < 2:
        raise BecameError(f"the column '{column}' of {name} has one value alone; there is nothing to learn.")
    return labels.astype(np.int64), Categorical()


def _drift(task_column: str, target_column: str) -> Table:
    """Return the table of our own making: 5 tasks of 600 rows, 8 numbers each, and noise of 0.1."""
    tasks, rows, width = 5, 600, 8
    draw = random_generator(0, "synthetic drift")
    centres = 1.5 * draw.normal(size=(tasks, width))
    first, second = draw.normal(size=(2, width)) / width**0.5
    x = np.concatenate([centre + draw.normal(size=(rows, width)) for centre in centres])
    y = np.sin(x @ first) + 0.5 * np.abs(x @ second) + 0.1 * draw.normal(size=len(x))
    columns: Table = {f"x{place}": x[:, place].tolist() for place in range(width)}
    return {**columns, task_column: np.repeat(np.arange(1, tasks + 1), rows).tolist(), target_column: y.tolist()}
