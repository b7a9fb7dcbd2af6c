"""Files that are whole or not there, and JSON that knows when it was changed.

Convention: a file is written under another name, forced to the disk and then renamed. Sealed JSON is an object whose
last entry, ``sha256``, is the digest of all others as compact JSON in the order of the file.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from became_core import BecameError

__all__ = [
    "DamagedError",
    "check_free",
    "check_is_file",
    "digest",
    "read_file",
    "read_sealed",
    "remove_temporary_files",
    "replaced",
    "write_file",
    "write_sealed",
]

SEAL = "sha256"


class DamagedError(BecameError):
    """A file that is not as it was written; the message is a clause about it, without a full stop."""


def check_free(out: Path) -> None:
    """Refuse a place where something is already, or that cannot be looked at."""
    try:
        is_there = out.exists() or out.is_symlink()
    except OSError as error:  # a folder without permission, or a name that is too long
        raise BecameError(f"cannot write {out}: {error.strerror}.") from None
    if is_there:
        raise BecameError(f"{out} exists; nothing is overwritten, so give another name.")


def write_file(file: Path, content: bytes, *, lasting: bool = True) -> None:
    """Write a file whole, folders included.

    Args:
        file: where.
        content: what.
        lasting: whether its name survives a crash of the machine too, once this returns; its content always does.

    Raises:
        BecameError: if it cannot be written; what was there before is still there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file, lasting=lasting) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise BecameError(f"cannot write {file}: {error.strerror}.") from None


@contextmanager
def replaced(file: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Yield the name of a file to write, which takes this one's place after the context; not if it ends in an error.

    Args:
        file: in a folder that exists.
        lasting: as of ``write_file``.

    Raises:
        OSError: if that cannot be done.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle)
        temporary.replace(file)
        if lasting:
            _sync_folder(file.parent)
    except BaseException:
        _remove_quietly(temporary)
        raise


def remove_temporary_files(folder: Path, names: str) -> None:
    """Remove the temporary files of processes that were killed while they wrote; what cannot be removed stays.

    A process may call this only while a lock keeps all others that write these files out.

    Args:
        folder: the folder of the files; it may be missing.
        names: a regular expression that matches the names under which the files would have been written.
    """
    for file in folder.glob(".*"):
        if re.fullmatch(rf"\.(?:{names})\.\d+", file.name):
            _remove_quietly(file)


def check_is_file(file: Path) -> None:
    """Refuse a pipe or a device, which might never end; the system itself refuses to read a folder.

    Raises:
        BecameError: if it is one.
        OSError: if the system cannot look at it.
    """
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise BecameError(f"{file} is no file.")


def read_file(file: Path, most: int | None = None) -> bytes:
    """Return a file's content.

    Args:
        file: which.
        most: how many bytes it may have; any number if None.

    Raises:
        BecameError: if it is no file, has more bytes, or cannot be read.
    """
    try:
        check_is_file(file)
        size = file.stat().st_size
        if most is not None and size > most:
            raise BecameError(f"{file} has {size:,} bytes; a file of this kind may have {most:,}.")
        return file.read_bytes()
    except OSError as error:
        raise BecameError(f"cannot read {file}: {error.strerror}.") from None


def write_sealed(file: Path, values: dict[str, Any], *, indent: int | None = None) -> None:
    """Write plain values as sealed JSON, on one line if there is no indent; raises as ``write_file`` does."""
    text = json.dumps({**values, SEAL: _seal(values)}, indent=indent, allow_nan=False)
    write_file(file, f"{text}\n".encode())


def read_sealed(file: Path) -> dict[str, Any]:
    """Return the values of a file of sealed JSON.

    Raises:
        DamagedError: if it is not as it was written.
        BecameError: if it cannot be read.
    """
    content = read_file(file)
    try:
        values = json.loads(content.decode())
        seal = values.pop(SEAL)
        if seal == _seal(values):
            return dict(values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DamagedError(f"{file} is damaged")


def digest(*parts: bytes | NDArray[Any]) -> str:
    """Return the SHA-256 of bytes and of what arrays hold, one after another."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return total.hexdigest()


def _seal(values: dict[str, Any]) -> str:
    return digest(json.dumps(values, separators=(",", ":"), allow_nan=False).encode())


def _sync_folder(folder: Path) -> None:
    """Force a renaming to the disk, where the system lets folders be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_quietly(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:  # the folder is gone or read-only, or a folder has this name: there is nothing that we can remove
        return
