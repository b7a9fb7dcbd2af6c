"""Labelled images from parquet in the hub's layout: a split is the files ``SPLIT-00000-of-00002.parquet`` and so on.

Convention: an image column holds encoded images (PNG, JPEG), a label column integers; decoded images are RGB, uint8
[N, 3, size, size], in the order of the files and of the rows within them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.benchmarks.assembly import Part
from adapters.benchmarks.huggingface import rows_of_file
from adapters.benchmarks.images import decoded
from became_core.errors import BecameError

if TYPE_CHECKING:
    import datasets

__all__ = ["Columns", "decode", "read_images", "split_files"]


@dataclass(frozen=True)
class Columns:
    """What to find in the rows.

    Attributes:
        image: the name of the image column.
        label: the name of the label column.
        size: the height and width of every image, in pixels.
        classes: the number of classes; labels are 0 … ``classes`` − 1.
    """

    image: str
    label: str
    size: int
    classes: int


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the parquet files of one split, in order.

    Raises:
        BecameError: if there are none, or fewer or more than their names promise (``…-of-00002``).
    """
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise BecameError(f"{folder} holds no file {split}-*.parquet: give the folder whose layout is the hub's.")
    promised = {int(total) for file in files for total in re.findall(r"-of-(\d+)", file.stem)}
    if promised and promised != {len(files)}:
        raise BecameError(
            f"{folder} holds {len(files)} of the files {split}-*.parquet where their names promise "
            f"{' and '.join(str(total) for total in sorted(promised))}: fetch the folder again."
        )
    return files


def read_images(files: Sequence[Path], columns: Columns) -> Part:
    """Return the images, uint8 [N, 3, size, size], and labels, int64 [N], of parquet files, one after the other.

    Raises:
        BecameError: if a file is corrupt, lacks a column, or holds an image or a label that ``columns`` rules out.
    """
    parts = [decode(rows_of_file(file), columns, str(file)) for file in files]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def decode(rows: "datasets.Dataset", columns: Columns, source: str) -> Part:
    """Return the images and labels of rows that are in memory; ``source`` is what messages call them.

    Raises:
        BecameError: as for `read_images`.
    """
    missing = [name for name in (columns.image, columns.label) if name not in rows.column_names]
    if missing:
        raise BecameError(f"{source} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}.")
    images = np.empty((len(rows), 3, columns.size, columns.size), dtype=np.uint8)
    labels = np.empty(len(rows), dtype=np.int64)
    for row, (encoded, label) in enumerate(_cells(rows, columns, source)):
        if not encoded:
            raise BecameError(f"row {row} of {source} holds no image.")
        images[row] = decoded(encoded, columns.size, f"row {row} of {source}")
        if not isinstance(label, int) or not 0 <= label < columns.classes:
            raise BecameError(f"row {row} of {source} has label {label!r}; labels are 0 … {columns.classes - 1}.")
        labels[row] = label
    return images, labels


def _cells(rows: "datasets.Dataset", columns: Columns, source: str) -> Iterator[tuple[bytes | None, Any]]:
    import datasets

    try:  # the bytes, as stored: decoding them here is twice as fast as through the library
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    except Exception as error:  # what casting raises depends on the type it meets
        raise BecameError(f"the column {columns.image!r} of {source} does not hold encoded images.") from error
    for batch in rows.iter(batch_size=1000):
        for cell, label in zip(batch[columns.image], batch[columns.label], strict=True):
            yield cell and cell["bytes"], label
