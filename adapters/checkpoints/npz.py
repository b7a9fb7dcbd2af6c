"""NumPy archives as stored tensors.

An archive is a zip file with an array in each of its files. An array that was stored as it is lies at one place, and is
read there like any other tensor. One that was compressed can only be read from its front to its back.
"""

import ast
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.tensors import DTYPES, SLAB, InputFile, StoredTensor, SuspendedError, dtype_word
from became_core import BecameError
from became_core.errors import first_line

__all__ = ["numpy_word", "read_npz"]

# The longest description of an array that is read, in bytes.
LONGEST_HEADER = 100_000
# The fixed part of what stands before each file in an archive, in bytes.
LOCAL_HEADER = 30
# How many slabs of a compressed array wait for threads that are behind.
MOST_PASSED = 8


def read_npz(path: Path) -> dict[str, StoredTensor]:
    """Return the arrays of a NumPy archive by name; raises a BecameError if it is none, or damaged."""
    tensors = {}
    file = InputFile(path)
    try:
        archive = zipfile.ZipFile(path)  # which all compressed arrays read from, and is closed with the last of them
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in tensors:
                raise BecameError(f"{path} holds '{member.filename}', which is no array or there twice.")
            tensors[name] = _npy(path, file, archive, member, name)
    except BecameError:
        raise
    except Exception as error:  # a damaged archive can fail anywhere in a decompressor, with errors of all kinds
        raise BecameError(f"{path} is no NumPy archive, or damaged ({first_line(error)}).") from None
    return tensors


def _npy(path: Path, file: InputFile, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> StoredTensor:
    what = f"'{name}' of {path}"
    with archive.open(member) as content:
        magic = content.read(8)
        if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
            raise BecameError(f"{what} is no NumPy array.")
        length = int.from_bytes(content.read(2 if magic[6] == 1 else 4), "little")
        if length > LONGEST_HEADER:
            raise BecameError(f"{what} has a header of {length} bytes, too many for an array.")
        text = content.read(length)
        begin = content.tell()
    try:
        header = ast.literal_eval(text.decode("latin1"))
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
        if not isinstance(shape, tuple) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        raise BecameError(f"{what} has a header that is not understood; it is damaged.") from None
    word = numpy_word(descr if isinstance(descr, str) else "object", what)
    if fortran and len(shape) > 1:
        raise BecameError(f"{what} is stored column by column; save numpy.ascontiguousarray of it.")
    if member.compress_type == zipfile.ZIP_STORED:
        # The local header has two lengths at its end, of the name and of what is added to it; the content follows.
        lengths = file.read(member.header_offset + 26, member.header_offset + LOCAL_HEADER).view("<u2")
        read = file.part(member.header_offset + LOCAL_HEADER + int(lengths.sum(dtype=np.int64)) + begin)
    else:
        read = _Compressed(path, archive, member, begin, SLAB * DTYPES[word].itemsize).read
    tensor = StoredTensor(name, word, shape, path, read)
    if begin + tensor.nbytes != member.file_size:
        raise BecameError(f"{what} has a shape that does not fit its {member.file_size - begin} bytes.")
    return tensor


class _Compressed:
    """A compressed array of an archive, which can only be read from the front to the back.

    Threads ask for slabs nearly in their order. What is passed over on the way to one is kept for who asks for it.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, begin: int, slab: int) -> None:
        self._path, self._archive, self._member, self._begin, self._slab = path, archive, member, begin, slab
        self._open: Any = None
        self._lock = threading.Lock()
        self._passed: dict[tuple[int, int], bytes] = {}

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        with self._lock:
            content = self._passed.pop((first, last), None)
            if content is None:
                try:
                    content = self._decompressed(first, last)
                except OSError as error:
                    raise SuspendedError(f"cannot read {self._path}: {error.strerror}.") from None
                except Exception as error:  # as above
                    name = self._member.filename
                    raise BecameError(f"'{name}' of {self._path} is damaged ({first_line(error)}).") from None
        if len(content) != last - first:
            raise BecameError(f"'{self._member.filename}' of {self._path} ends too early; the archive is damaged.")
        return np.frombuffer(content, dtype=np.uint8)

    def _decompressed(self, first: int, last: int) -> bytes:
        place = None if self._open is None else self._open.tell() - self._begin
        if place is None or place > first:
            self._close()
            self._open, self._passed, place = self._archive.open(self._member), {}, 0
            self._open.read(self._begin)
        oldest = first - MOST_PASSED * self._slab
        while place < first:
            stop = min(place + self._slab, first)
            content = self._open.read(stop - place)
            if place >= oldest:
                self._passed[place, stop] = content
            place = stop
        self._passed = {part: content for part, content in self._passed.items() if part[0] >= oldest}
        content = self._open.read(last - first)
        if self._begin + last == self._member.file_size:
            self._close()
        return bytes(content)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None


def numpy_word(name: str, what: str) -> str:
    """Return the word of a dtype that NumPy knows by name; raises a BecameError if it is not known."""
    try:
        return dtype_word(np.dtype(name), what)
    except TypeError:
        raise BecameError(f"{what} has dtype '{name}', which is not known; known are {', '.join(DTYPES)}.") from None
