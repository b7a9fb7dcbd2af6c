"""A lock file that keeps two processes, or two threads, out of one folder.

The lock is the operating system's, taken by ``filelock``. The system lets go of it when its process ends, however it
does: a file that a dead process left is taken over.

Convention: the file holds a blank and then the number of the process. Windows locks the first byte for reading too, so
that nobody else could read a number that begins there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from became_core import BecameError

__all__ = ["BusyError", "locked"]


class BusyError(BecameError):
    """Another process holds the lock."""


@contextmanager
def locked(file: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file for the time of this context; it names this process, and is removed at the end.

    Args:
        file: the lock file.
        wait: whether to wait while another process holds it.

    Raises:
        BusyError: if another process holds it and this one does not wait.
        BecameError: if it cannot be made.
    """
    lock = FileLock(file, timeout=-1 if wait else 0, on_acquired=_write_holder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"{_read_holder(file)} is at work in {file.parent}; wait for it or choose another --out."
        ) from None
    except OSError as error:
        raise BecameError(f"cannot write {file}: {error.strerror}.") from None
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for it sees that it is gone, and makes a new one. Windows removes no
        # file that is open; there, the release removes it.
        with suppress(OSError):
            file.unlink()
        lock.release()


def _write_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f" {os.getpid()}\n".encode())


def _read_holder(file: Path) -> str:
    try:
        with file.open("rb", buffering=0) as handle:
            handle.seek(1)
            return f"another process ({int(handle.read(20))})"
    except (OSError, ValueError):
        return "another process"
