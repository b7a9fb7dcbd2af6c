"""Finished runs compared: what makes a row, what is refused, and every rendering of it."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.analysis.bootstrap import estimate
from adapters.cli.__main__ import main
from adapters.cli.compare import comparison, gather
from adapters.cli.rendering import FORMATS, Column, Sheet
from adapters.runs import RunDirectory, RunResult
from became_core import BecameError

CONFIG = {"tasks": 2, "first": 2, "stage1": {"epochs": 3}}


def save(out: Path, method: str, seed: int, last: float = 80.0, **changes: Any) -> None:
    """Write a run of two tasks that ends at this accuracy on the first."""
    values: dict[str, Any] = {
        "backend": "torch",
        "benchmark": "split-mnist",
        "config": CONFIG,
        "accuracy": np.array([[90.0, np.nan], [last, 95.0]]),
        "class_incremental_accuracy": np.array([[90.0, np.nan], [20.0, 95.0]]),
        "alpha": [None, None],
        "epochs": [3, 3],
        "ranks": [{}, {}],
        "paths": [],
        "seconds": {"total": 2.0},
        "memory": [2**20, 3 * 2**20],
    }
    RunDirectory(out, method, seed).save(RunResult(method=method, seed=seed, **(values | changes)))


def sheets(*outs: Path, baseline: str | None = None) -> list[Sheet]:
    return comparison(gather(outs), baseline)


def cells(sheet: Sheet) -> dict[str, dict[str, str]]:
    """A sheet's texts by the first cell of a row and the heading."""
    return {row[0]: dict(zip([c.heading for c in sheet.columns], row, strict=True)) for row in sheet.texts()}


def test_a_row_is_a_method_over_its_seeds_in_whatever_folders(tmp_path: Path) -> None:
    save(tmp_path / "a", "gpm", 0, 80.0)
    save(tmp_path / "b", "gpm", 1, 84.0)
    save(tmp_path / "b", "ewc", 0)
    (sheet,) = sheets(tmp_path / "a", tmp_path / "b")
    found = cells(sheet)
    assert list(found) == ["gpm", "ewc"]
    assert found["gpm"] == {
        "method": "gpm",
        "seeds": "2",
        "ACC": "88.50 ± 1.41",
        "BWT": "-8.00 ± 2.83",
        "forgetting": "8.00 ± 2.83",
        "plasticity": "92.50 ± 0.00",
        "class-inc. ACC": "57.50 ± 0.00",
        "epochs": "6 ± 0",
        "seconds": "2 ± 0",
        "memory": "3.0 ± 0.0",
    }
    assert found["ewc"]["ACC"] == "87.50"  # no deviation of one


def test_one_method_with_two_configurations_is_two_rows(tmp_path: Path) -> None:
    save(tmp_path / "short", "gpm", 0)
    save(tmp_path / "long", "gpm", 0, config=CONFIG | {"stage1": {"epochs": 9}})
    save(tmp_path / "long", "gpm", 1, backend="jax", config=CONFIG | {"stage1": {"epochs": 9}, "class_order": "label"})
    (sheet,) = sheets(tmp_path / "short", tmp_path / "long")
    assert list(cells(sheet)) == ["gpm (short, torch)", "gpm (long, torch)", "gpm (long, jax)"]


def test_forward_transfer_is_shown_where_it_is_defined_and_memory_where_it_was_recorded(tmp_path: Path) -> None:
    save(tmp_path, "gpm", 0, accuracy=np.array([[90.0, 30.0], [80.0, 95.0]]))
    save(tmp_path, "ewc", 0, memory=[])
    found = cells(sheets(tmp_path)[0])
    assert (found["gpm"]["FWT"], found["ewc"]["FWT"]) == ("30.00", "–")
    assert (found["gpm"]["memory"], found["ewc"]["memory"]) == ("3.0", "–")


def test_differences_are_by_seed_with_an_interval_where_there_are_several(tmp_path: Path) -> None:
    for seed, start in enumerate((60.0, 80.0, 70.0)):
        save(tmp_path, "gpm", seed, start)
        save(tmp_path, "became", seed, start + 2 + 2 * (seed == 1))
    save(tmp_path, "ewc", 2, 60.0)
    _, sheet = sheets(tmp_path, baseline="gpm")
    found = cells(sheet)
    assert set(found) == {"became", "ewc"}
    assert found["became"]["seeds"] == "3"
    assert found["became"]["Δ ACC"] == "1.33 [1.00, 2.00]"
    assert (found["ewc"]["seeds"], found["ewc"]["Δ ACC"]) == ("1", "-5.00")
    assert "10,000 bootstrap means" in sheet.notes[0]


def test_published_numbers_stand_beside_those_of_the_same_tasks_alone(tmp_path: Path) -> None:
    cifar: dict[str, Any] = {"benchmark": "split-cifar100", "config": CONFIG | {"tasks": 20, "first": 20}}
    save(tmp_path / "all", "nscl", 0, **cifar)
    _, sheet = sheets(tmp_path / "all")
    row = cells(sheet)["nscl"]
    assert (row["ACC"], row["BWT"], row["forgetting"], row["source"]) == ("75.95", "-3.66", "–", "1")
    assert any("Adam-NSCL (Wang, CVPR 2021)" in note and "80 epochs" in note for note in sheet.notes)
    save(tmp_path / "some", "nscl", 0, **cifar | {"config": CONFIG | {"tasks": 20, "first": 5}})
    assert [each.title for each in sheets(tmp_path / "some")] == ["split-cifar100, 20 tasks, the first 5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "split-cifar100"}, "holds runs of split-cifar100, the others are of split-mnist; compare runs"),
        ({"config": CONFIG | {"tasks": 5}}, "holds runs with tasks = 5, the others have 2; compare runs of one class"),
        ({"config": CONFIG | {"first": 1}}, "holds runs with first = 1, the others have 2"),
        ({"config": CONFIG | {"class_order": "random"}}, "with class_order = random, the others have label"),
        ({}, "gpm with seed 0 is there twice, again in .*b; leave one out."),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path / "a", "gpm", 0)
    save(tmp_path / "b", "gpm", 0, **changes)
    with pytest.raises(BecameError, match=message):
        gather([tmp_path / "a", tmp_path / "b"])


def test_the_command_prints_every_format_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "gpm", 0)
    for name in FORMATS:
        assert main(["compare", str(tmp_path), "--format", name]) == 0
        assert "87.5" in capsys.readouterr().out
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "nowhere holds no finished runs; give a folder that --out named."),
        ([str(tmp_path), "--baseline", "sgd"], "there is no baseline 'sgd'; choose from 'gpm'."),
        ([], "there is nothing to compare; give a folder that --out named."),
    ):
        assert main(["compare", *arguments]) == 2
        assert capsys.readouterr().err.endswith(f"{message}\n")


SHEET = Sheet(
    "A & B",
    [Column("method_name"), Column("Δ ACC", 2)],
    [["a|b", estimate([-1.0, -3.0])], ["50%", None]],
    notes=["A note."],
)


def test_markdown() -> None:
    assert FORMATS["markdown"]([SHEET]).splitlines() == [
        "**A & B**",
        "",
        "| method_name | Δ ACC |",
        "| --- | ---: |",
        "| a\\|b | -2.00 ± 1.41 |",
        "| 50% | – |",
        "",
        "A note.",
    ]


def test_latex_escapes_what_it_must() -> None:
    text = FORMATS["latex"]([SHEET])
    for line in (
        r"\caption{A \& B. A note.}",
        r"method\_name & $\Delta$ ACC \\",
        r"a|b & $-$2.00 $\pm$ 1.41 \\",
        r"50\% & -- \\",
    ):
        assert line in text.splitlines()


def test_csv_has_every_number_in_full() -> None:
    heading, first, second = csv.reader(io.StringIO(FORMATS["csv"]([SHEET])))
    assert heading == ["method_name", "Δ ACC", "Δ ACC sd", "Δ ACC low", "Δ ACC high", "Δ ACC runs"]
    assert first[:2] == ["a|b", "-2.0"]
    assert [float(value) for value in first[2:]] == pytest.approx([2**0.5, -3.0, -1.0, 2])
    assert second == ["50%", "", "", "", "", ""]


def test_text_takes_brackets_as_they_are() -> None:
    sheet = Sheet("[red]", [Column("method"), Column("ACC", 1)], [["[bold]", estimate([1.0, 2.0])]], intervals=True)
    text = FORMATS["text"]([sheet])
    assert "[red]" in text
    assert "[bold]" in text
    assert "1.5 [1.0, 2.0]" in text
