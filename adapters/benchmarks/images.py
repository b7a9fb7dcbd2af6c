"""Encoded images (PNG, JPEG), checked and decoded, and images that lie one a file in a folder for each class.

Convention: decoded images are RGB, whatever they were, uint8 [3, size, size]; classes are folders, in the order of
their names, and images are in the order of theirs.
"""

import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from became_core.errors import BecameError

__all__ = ["decoded", "image_files", "read_files", "subfolders"]

_PNG = b"\x89PNG\r\n\x1a\n"
_SUFFIXES = (".jpeg", ".jpg", ".png")


def decoded(encoded: bytes, size: int, source: str) -> NDArray[np.uint8]:
    """Return the pixels of one encoded image, [3, size, size]; ``source`` is what messages call it.

    Raises:
        BecameError: if it is no PNG or JPEG, is corrupt or truncated, or of another size.
    """
    from PIL import Image

    try:
        if encoded.startswith(_PNG):
            _check_png(encoded)
        # Only what these data sets hold: no other of Pillow's many decoders meets a file from elsewhere.
        image = Image.open(BytesIO(encoded), formats=("PNG", "JPEG"))
        # Pixels are decoded later, so an image that claims to be huge takes no memory.
        pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1) if image.size == (size, size) else None
    except Exception as error:  # a corrupt image can fail anywhere in a decoder, with errors of all kinds
        raise BecameError(f"{source} holds a corrupt image: fetch it again.") from error
    if pixels is None:
        raise BecameError(f"{source} is {image.width}×{image.height} pixels; every image must be {size}×{size}.")
    return pixels


def subfolders(folder: Path) -> list[Path]:
    """Return the folders within a folder, hidden ones left out, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """Return the images of a folder, in the order of their names.

    Raises:
        BecameError: if there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise BecameError(f"there is no folder {folder}, which must hold a class's images: fetch the data set again.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise BecameError(f"{folder} holds no images ({', '.join(_SUFFIXES)}): fetch the data set again.")
    return files


def read_files(files: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """Return the images of files, one a file, [N, 3, size, size].

    Raises:
        BecameError: if a file cannot be read, or `decoded` refuses what it holds.
    """
    images = np.empty((len(files), 3, size, size), dtype=np.uint8)
    for row, file in enumerate(files):
        try:
            encoded = file.read_bytes()
        except (OSError, ValueError) as error:  # the name, which a list may give, can be no name of a file
            raise BecameError(f"there is no file {str(file)!r} that can be read: fetch the data set again.") from error
        images[row] = decoded(encoded, size, str(file))
    return images


def _check_png(encoded: bytes) -> None:
    """Raise ValueError if a chunk differs from its checksum.

    Pillow's decoder skips the checksums of pixels, so one flipped bit in a hundred would pass; its ``verify`` does not,
    but takes ten times as long as this.
    """
    start = len(_PNG)
    while start < len(encoded):  # a chunk: length, type, data, checksum of type and data
        end = start + 8 + int.from_bytes(encoded[start : start + 4])
        if zlib.crc32(encoded[start + 4 : end]) != int.from_bytes(encoded[end : end + 4]):
            raise ValueError(f"the checksum at byte {end} is wrong")
        start = end + 4
