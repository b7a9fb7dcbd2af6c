"""Small pictures for the tests of loaders, and the files they come in."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

__all__ = ["encoded", "shades", "write_parquet"]


def shades(count: int, size: int) -> NDArray[np.uint8]:
    """Pictures of one colour each, all different (up to 65,536), [N, size, size, 3]."""
    numbers = np.arange(count)
    colours = np.stack([numbers % 256, numbers // 256, 255 - numbers % 256], axis=1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None, :], (count, size, size, 3))


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
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
