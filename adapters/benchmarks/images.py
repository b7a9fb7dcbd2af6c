"""Encoded images (PNG, JPEG), checked and decoded, and images that lie one a file in a folder for each class.

Convention: decoded images are RGB, whatever they were, uint8 [3, size, size]; classes are folders, in the order of
their names, and images are in the order of theirs. An image is of that size already, or it is resized, bilinearly and
with antialiasing, until its shorter side has some length, and the middle of that size is kept.
"""

import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from became_core.errors import BecameError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = ["decoded", "image_files", "read_files", "read_resized", "subfolders"]

_PNG = b"\x89PNG\r\n\x1a\n"
_SUFFIXES = (".jpeg", ".jpg", ".png")
_MOST_PIXELS = 2**26  # of an image that is resized


def decoded(encoded: bytes, size: int, source: str) -> NDArray[np.uint8]:
    """Return the pixels of one encoded image, [3, size, size]; ``source`` is what messages call it.

    Raises:
        BecameError: if it is no PNG or JPEG, is corrupt or truncated, of another size, or grey with 16 bits.
    """

    def as_it_is(image: "Picture") -> "Picture":
        if image.size != (size, size):
            raise BecameError(f"{source} is {image.width}×{image.height} pixels; every image must be {size}×{size}.")
        return image.convert("RGB")

    return _pixels(encoded, as_it_is, source)


def _pixels(encoded: bytes, convert: Callable[["Picture"], "Picture"], source: str) -> NDArray[np.uint8]:
    """Return the pixels of an encoded image, [3, height, width], after a conversion, which may refuse its size.

    Raises:
        BecameError: if it is no PNG or JPEG, is corrupt or truncated, or grey with 16 bits a pixel.
    """
    from PIL import Image

    try:
        if encoded.startswith(_PNG):
            _check_png(encoded)
        # Only what these data sets hold: no other of Pillow's many decoders meets a file from elsewhere.
        image = Image.open(BytesIO(encoded), formats=("PNG", "JPEG"))
        if image.mode.startswith(("I", "F")):  # Pillow would cut what is above 255
            raise BecameError(f"{source} has 16 bits a pixel, which would become white; save it with 8.")
        # Pixels are decoded by the conversion, so an image that claims to be huge takes no memory.
        return np.asarray(convert(image)).transpose(2, 0, 1)
    except BecameError:
        raise
    except Exception as error:  # a corrupt image can fail anywhere in a decoder, with errors of all kinds
        raise BecameError(f"{source} holds a corrupt image: fetch it again.") from error


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
        images[row] = decoded(_content(file), size, str(file))
    return images


def read_resized(files: Sequence[Path], shorter: int, size: int) -> NDArray[np.uint8]:
    """Return the middles of images of any size, one a file, [N, 3, size, size].

    Args:
        files: of the images.
        shorter: the length to which each image's shorter side is resized, in pixels; at least the size.
        size: the height and width of the middle that is kept.

    Raises:
        BecameError: if a file cannot be read, is no PNG or JPEG, is corrupt, or has more than 67 million pixels.
    """
    from PIL.Image import Resampling

    def middle(image: "Picture") -> "Picture":
        width, height = image.size
        if width * height > _MOST_PIXELS:
            raise BecameError(f"{source} is {width}×{height} pixels; an image has at most {_MOST_PIXELS:,} in all.")
        by = shorter / min(width, height)
        width, height = max(shorter, int(width * by)), max(shorter, int(height * by))
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = image.convert("RGB").resize((width, height), Resampling.BILINEAR)
        return resized.crop((left, top, left + size, top + size))

    images = np.empty((len(files), 3, size, size), dtype=np.uint8)
    for row, file in enumerate(files):
        source = str(file)
        images[row] = _pixels(_content(file), middle, source)
    return images


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (OSError, ValueError) as error:  # the name, which a list may give, can be no name of a file
        raise BecameError(f"there is no file {str(file)!r} that can be read: fetch the data set again.") from error


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
