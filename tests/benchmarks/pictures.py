"""Small pictures for the tests of loaders, and the files they come in."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "TINY_NAMES",
    "TINY_TRAIN",
    "TINY_VALID",
    "encoded",
    "shades",
    "write_parquet",
    "write_tiny_hub",
    "write_tiny_zip",
]


def shades(count: int, size: int) -> NDArray[np.uint8]:
    """Pictures of one colour each, all different (up to 65,536), [N, size, size, 3]."""
    numbers = np.arange(count)
    colours = np.stack([numbers % 256, numbers // 256, 255 - numbers % 256], axis=1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None, :], (count, size, size, 3))


def encoded(pixels: NDArray[Any], kind: str = "PNG") -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_parquet(file: Path, images: Sequence[bytes | None], labels: Sequence[int | None]) -> None:
    """The columns image and label, as the hub has them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = pa.array(
        [{"bytes": image, "path": None} for image in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": cells, "label": pa.array(labels, pa.int64())}), file)


TINY_NAMES = [f"n{number:08d}" for number in range(1000, 1200)]
TINY_TRAIN, TINY_VALID = shades(400, 64), shades(600, 64)[400:]  # two of each class, and one


def write_tiny_hub(root: Path) -> Path:
    """TinyImageNet as the hub has it."""
    folder = root / "zh-plus" / "tiny-imagenet" / "data"
    labels = [*range(200)]
    write_parquet(folder / "train-00000-of-00001.parquet", [encoded(image) for image in TINY_TRAIN], sorted(labels * 2))
    write_parquet(folder / "valid-00000-of-00001.parquet", [encoded(image) for image in TINY_VALID], labels)
    return folder


def write_tiny_zip(root: Path) -> Path:
    """TinyImageNet as its zip unpacks."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for label, name in enumerate(TINY_NAMES):
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        for row in (0, 1):  # PNG in spite of the suffix, so that pixels can be compared
            (images / f"{name}_{row}.JPEG").write_bytes(encoded(TINY_TRAIN[2 * label + row]))
        (folder / "val" / "images" / f"val_{label}.JPEG").write_bytes(encoded(TINY_VALID[label]))
        lines.append(f"val_{label}.JPEG\t{name}\t0\t0\t63\t63\n")
    (folder / "wnids.txt").write_text("\n".join(reversed(TINY_NAMES)) + "\n")  # in no order
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder
