"""Images in NumPy's own files: ``NAME.npz`` with images and labels, or ``NAME-images.npy`` and ``NAME-labels.npy``.

Convention: images are uint8 [N, size, size, 3], or [N, size, size] and [N, size, size, 1] if greyscale; labels are
integers [N]. Nothing is ever unpickled: an array of objects is refused.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.benchmarks.assembly import Part
from became_core.errors import BecameError

__all__ = ["read_archive"]


def read_archive(folder: Path, name: str, size: int) -> Part | None:
    """Return the images, uint8 [N, 3, size, size], and labels, int64 [N], under a name; None if there are no files.

    Raises:
        BecameError: if a file is corrupt, truncated or of pickled objects, or its arrays are not as the convention has
            them.
    """
    archive = folder / f"{name}.npz"
    if archive.is_file():
        arrays = [_member(archive, key) for key in ("images", "labels")]
        sources = [f"the array {key!r} of {archive}" for key in ("images", "labels")]
    else:
        files = [folder / f"{name}-{key}.npy" for key in ("images", "labels")]
        if not any(file.is_file() for file in files):
            return None
        arrays = [_load(file) for file in files]
        sources = [str(file) for file in files]
    images, labels = _checked_images(arrays[0], size, sources[0]), _checked_labels(arrays[1], sources[1])
    if len(images) != len(labels):
        raise BecameError(f"{sources[0]} holds {len(images)} images but {sources[1]} {len(labels)} labels.")
    return images, labels


def _load(file: Path) -> Any:
    if not file.is_file():
        raise BecameError(f"there is no file {file}, which belongs to the one beside it.")
    try:  # mapped, not read: a header that promises more than there is fails at once
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a corrupt file can fail in many ways
        raise _unreadable(file) from error


def _member(archive: Path, key: str) -> Any:
    try:
        with archive.open("rb") as file, np.load(file, allow_pickle=False) as members:
            if key in members.files:
                return members[key]
            names = ", ".join(members.files)
    except Exception as error:  # zip, zlib and NumPy have errors of their own
        raise _unreadable(archive) from error
    raise BecameError(f"{archive} has no array {key!r}; its arrays are {names}.")


def _unreadable(file: Path) -> BecameError:
    return BecameError(f"{file} is damaged or holds pickled objects, which are never read: save plain arrays again.")


def _checked_images(array: Any, size: int, source: str) -> NDArray[np.uint8]:
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    grey = shape is not None and (len(shape) == 3 or shape[3:] == (1,))
    if dtype != np.uint8 or shape is None or shape[1:] not in {(size, size), (size, size, 1), (size, size, 3)}:
        raise BecameError(f"{source} is {dtype} {shape}; it must be uint8 [N, {size}, {size}, 3].")
    images = array.reshape(len(array), size, size, -1).transpose(0, 3, 1, 2)
    return np.array(np.repeat(images, 3, axis=1) if grey else images, order="C")


def _checked_labels(array: Any, source: str) -> NDArray[np.int64]:
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if dtype is None or dtype.kind not in "iu" or shape is None or len(shape) != 1:
        raise BecameError(f"{source} is {dtype} {shape}; it must be integers [N].")
    return np.array(array, dtype=np.int64)
