"""Pictures that a run records: what a network that makes pictures makes of some samples, as a PNG file in a text.

Convention: pixels are between 0 and 1, and 1 is ink, black on white.
"""

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["picture_text", "side_by_side"]


def side_by_side(rows: NDArray[Any]) -> NDArray[Any]:
    """Return pictures [rows, columns, height, width] as one, with a blank pixel between two.

    Example:
        >>> side_by_side(np.ones((1, 2, 1, 2))).tolist()
        [[1.0, 1.0, 0.0, 1.0, 1.0]]
    """
    apart = np.pad(rows, ((0, 0), (0, 0), (0, 1), (0, 1)))
    count, columns, height, width = apart.shape
    whole: NDArray[Any] = apart.transpose(0, 2, 1, 3).reshape(count * height, columns * width)
    return whole[:-1, :-1]


def picture_text(pixels: NDArray[Any]) -> str:
    """Return a grey picture [height, width] as the address that a browser shows it by, ``data:image/png;base64,...``.

    Example:
        >>> picture_text(np.zeros((2, 2)))[:22]
        'data:image/png;base64,'
    """
    grey = np.round(255 * (1 - np.clip(pixels, 0.0, 1.0))).astype(np.uint8)
    height, width = grey.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in grey)  # each begins with its filter: none
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(file).decode()
