"""Tensors that lie in files: their types, where their bytes are, and how a part of one is read.

A tensor is never read whole. It is read in slabs, ranges of its elements in the order of its axes (C order), so that
memory does not grow with the model. The header of a safetensors file is read here too, and nothing that it says is
believed before it is checked: a file that a stranger sent is refused in one sentence.

Convention: a dtype is named as in safetensors (``BF16``, ``F32``, ``I64``); ranges count elements, not bytes.
"""

import errno
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.resources import TOO_MANY_FILES
from became_core import BecameError

__all__ = [
    "DTYPES",
    "FLOATS",
    "SLAB",
    "InputFile",
    "StoredTensor",
    "SuspendedError",
    "dtype_word",
    "equal",
    "finite",
    "narrowed",
    "parse_json",
    "ranges",
    "read_safetensors",
    "safetensors_header",
    "scratch",
    "size_text",
    "widened",
]

# The elements that are read, merged and written at a time. Results do not depend on how much memory there is, because
# this number is fixed: sums are taken slab by slab.
SLAB = 2**18

FLOATS: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
DTYPES: Mapping[str, np.dtype[Any]] = {
    **FLOATS,
    **{f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (8, 4, 2, 1)},
    "BOOL": np.dtype(np.bool_),
}

# The longest header that the safetensors library itself accepts.
LONGEST_HEADER = 100_000_000
# More axes than any array library knows.
MOST_AXES = 32


class SuspendedError(BecameError):
    """A merge cannot go on now, although nothing is wrong with it; what is done of it stays."""


class _Scratch(threading.local):
    """Memory that a thread uses again for each block of a merge.

    Fresh memory for each slab costs as much as the arithmetic, because the system has to clear its pages. Outside of
    ``block`` every array is fresh.
    """

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint8]] = []
        self._used: int | None = None

    @contextmanager
    def block(self) -> Iterator[None]:
        """Take memory again that was given in the last block of this thread."""
        self._used = 0
        try:
            yield
        finally:
            self._used = None

    def empty(self, count: int, dtype: Any) -> NDArray[Any]:
        """Return a flat array, valid until this thread's next block."""
        if self._used is None:
            return np.empty(count, dtype)
        nbytes, place = count * np.dtype(dtype).itemsize, self._used
        self._used += 1
        if place == len(self._buffers):
            self._buffers.append(np.empty(nbytes, np.uint8))
        elif self._buffers[place].size < nbytes:
            self._buffers[place] = np.empty(nbytes, np.uint8)
        return self._buffers[place][:nbytes].view(dtype)


scratch = _Scratch()


class InputFile:
    """A file that threads read from at any place."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises a BecameError if it cannot be read."""
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            reason = TOO_MANY_FILES if error.errno == errno.EMFILE else error.strerror
            raise BecameError(f"cannot read {path}: {reason}.") from None
        weakref.finalize(self, os.close, self._handle)
        self.size = os.fstat(self._handle).st_size
        self._lock = threading.Lock()

    def read(self, begin: int, end: int) -> NDArray[np.uint8]:
        """Return the bytes of a range.

        Raises:
            BecameError: if the file is shorter.
            SuspendedError: if it cannot be read, as when a disk of the network is gone for a while.
        """
        content = scratch.empty(end - begin, np.uint8)
        view, done = memoryview(content), 0  # type: ignore[arg-type]
        try:
            while done < len(content):
                if hasattr(os, "preadv"):
                    count = os.preadv(self._handle, [view[done:]], begin + done)
                else:  # pragma: no cover # Windows
                    with self._lock:
                        os.lseek(self._handle, begin + done, os.SEEK_SET)
                        part = os.read(self._handle, len(content) - done)
                    count = len(part)
                    view[done : done + count] = part
                if count == 0:
                    raise BecameError(f"{self.path} ends at byte {begin + done}, before {end}; it is not whole.")
                done += count
        except OSError as error:
            raise SuspendedError(f"cannot read {self.path}: {error.strerror}.") from None
        return content

    def part(self, begin: int) -> Callable[[int, int], NDArray[np.uint8]]:
        """Return what reads a range that is counted from a byte of the file."""
        return lambda first, last: self.read(begin + first, begin + last)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: by which the file knows it.
        dtype: one of ``DTYPES``.
        shape: its axes.
        file: where it lies.
        read_bytes: from the first and the last byte of a range of the tensor to its content.
        memory: equal for two tensors that share their memory; None where nothing is shared.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    read_bytes: Callable[[int, int], NDArray[np.uint8]] = field(compare=False, repr=False)
    memory: object = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype in FLOATS

    def slab(self, start: int, stop: int) -> NDArray[Any]:
        """Return a range of its elements, flat and as they are stored."""
        dtype = DTYPES[self.dtype]
        return self.read_bytes(start * dtype.itemsize, stop * dtype.itemsize).view(dtype)

    def whole(self) -> NDArray[Any]:
        """Return all of it in its shape; for tensors that are known to be small."""
        return self.slab(0, self.size).reshape(self.shape)

    def __str__(self) -> str:
        """Name the tensor and its file in a message."""
        return f"'{self.name}' of {self.file}"


def ranges(size: int) -> Iterable[tuple[int, int]]:
    """Return the slabs of a tensor with this many elements, as first and last element.

    Example:
        >>> list(ranges(SLAB + 1))
        [(0, 262144), (262144, 262145)]
    """
    return ((start, min(start + SLAB, size)) for start in range(0, size, SLAB))


def equal(left: StoredTensor, right: StoredTensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes, read slab by slab."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return all(
        np.array_equal(left.read_bytes(start, stop), right.read_bytes(start, stop))
        for start, stop in ranges(left.nbytes)
    )


def widened(values: NDArray[Any], least: Any = np.float32) -> NDArray[Any]:
    """Return stored numbers in float32, or as wide as they are or as asked for."""
    dtype = np.float64 if values.dtype == np.float64 or least == np.float64 else np.float32
    return _converted(values, dtype)


def finite(values: NDArray[Any], tensor: StoredTensor) -> NDArray[Any]:
    """Return values of a tensor, in at least float32; raise a BecameError if one is infinite or not a number."""
    wide = widened(values)
    if wide.size and not (wide.max() < np.inf and wide.min() > -np.inf):
        raise BecameError(f"{tensor} has an entry that is infinite or not a number; every entry must be finite.")
    return wide


def narrowed(values: NDArray[Any], word: str, name: str) -> NDArray[Any]:
    """Return wide numbers in the dtype in which they are stored, rounded to the nearest.

    Raises:
        BecameError: if a number is not finite, or too large for the dtype.
    """
    dtype = DTYPES[word]
    if values.size == 0:
        return _converted(values, dtype)
    # A comparison with NaN is false, so that NaN is refused here too.
    largest, least = float(values.max()), float(values.min())
    finite = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    if not (largest <= finite and least >= -finite):
        wrong = largest if not largest <= finite else least
        raise BecameError(f"the merged '{name}' has an entry {wrong:.4g}, which {word} cannot hold; try --out-dtype.")
    return _converted(values, dtype)


def _converted(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    if values.dtype == dtype:
        return values
    result = scratch.empty(values.size, dtype)
    np.copyto(result, values.reshape(-1), casting="unsafe")
    return result.reshape(values.shape)


def dtype_word(dtype: Any, what: str) -> str:
    """Return the word of a NumPy dtype.

    Raises:
        BecameError: if it is no dtype of numbers that this package stores.
    """
    for word, known in DTYPES.items():
        if dtype == known:
            return word
    raise BecameError(f"{what} has dtype '{dtype}', which is not known; known are {', '.join(DTYPES)}.")


def size_text(count: float) -> str:
    """Return a number of bytes for people.

    Example:
        >>> size_text(3 * 2**20)
        '3.0 MiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_json(content: bytes, where: object) -> Any:
    """Return the value of JSON that may come from a stranger.

    Raises:
        BecameError: if it is no JSON, nests too deep, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in values if names.count(name) > 1)
            raise BecameError(f"{where} has '{_short(double)}' twice.")
        return values

    try:
        return json.loads(content.decode(), object_pairs_hook=unique)
    except BecameError:
        raise
    except (ValueError, RecursionError):
        raise BecameError(f"{where} is not valid JSON.") from None


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, in the order of their bytes, and the file's metadata.

    Raises:
        BecameError: if the file is not one, its header says what cannot be, or a dtype is not known.
    """
    file = InputFile(path)
    if file.size < 8:
        raise BecameError(f"{path} has {file.size} bytes, too few for a safetensors file.")
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > LONGEST_HEADER or length > file.size - 8:
        raise BecameError(f"{path} claims a header of {length} bytes but has {file.size}; it is cut off or damaged.")
    header = parse_json(file.read(8, 8 + length).tobytes(), f"the header of {path}")
    if not isinstance(header, dict):
        raise BecameError(f"the header of {path} is no object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BecameError(f"the metadata of {path} is not text by name.")
    begin, room = 8 + length, file.size - 8 - length
    entries = []
    for name, entry in header.items():
        word, shape, (first, last) = _entry(name, entry, path, room)
        entries.append((first, last, name, word, shape))
    end = 0
    tensors = {}
    for first, last, name, word, shape in sorted(entries, key=lambda entry: entry[:2]):
        if first != end:
            problem = "overlaps the tensor before it" if first < end else "leaves a hole before it"
            raise BecameError(f"'{_short(name)}' in {path} {problem}; the file is damaged.")
        end = last
        tensors[name] = StoredTensor(name, word, shape, path, file.part(begin + first))
    if end != room:
        raise BecameError(f"{path} has {room} bytes of tensors but names {end} of them; it is cut off or damaged.")
    return tensors, metadata


def _entry(name: str, entry: Any, path: Path, room: int) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return the dtype, the shape and the range of bytes that a header gives a tensor, once they fit together."""
    what = f"'{_short(name)}' in {path}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BecameError(f"{what} has not just a dtype, a shape and offsets; the file is damaged.")
    word, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(word, str) or word not in DTYPES:
        raise BecameError(f"{what} has dtype '{_short(str(word))}', which is not known; known are {', '.join(DTYPES)}.")
    if not _are_counts(shape) or len(shape) > MOST_AXES:
        raise BecameError(f"{what} has a shape that is no list of at most {MOST_AXES} sizes; the file is damaged.")
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        raise BecameError(f"{what} has offsets that lie outside the file; the file is cut off or damaged.")
    if prod(shape) * DTYPES[word].itemsize != offsets[1] - offsets[0]:
        raise BecameError(f"{what} has a shape that does not fit its {offsets[1] - offsets[0]} bytes.")
    return word, tuple(shape), (offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _short(text: str) -> str:
    """A name from a stranger's file, fit for one line."""
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def safetensors_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return what a safetensors file begins with, and at which byte of the file each tensor lies.

    Args:
        tensors: name, dtype and shape of each, in the order in which they lie in the file.
        metadata: text by name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places, end = {}, 0
    for name, word, shape in tensors:
        places[name], begin = end, end
        end += prod(shape) * DTYPES[word].itemsize
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that tensors lie at multiples of 8
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + place for name, place in places.items()}
