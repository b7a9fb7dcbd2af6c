"""A lock file that keeps two processes out of one folder.

The lock is the operating system's (``flock``), which lets go of it when its process ends, however it does: a file that
a dead process left is taken over. Where the system has no such locks (Windows), nothing is locked.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from became_core import BecameError

try:
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]


@contextmanager
def locked(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file for the time of this context; it holds this process's number, and is removed at the end.

    Args:
        file: the lock file.
        wait: whether to wait while another process holds it.

    Yields:
        Whether other processes are really kept out: False only where the system has no such locks.

    Raises:
        BecameError: if another process holds it and this one does not wait, or it cannot be made.
    """
    if fcntl is None:  # pragma: no cover
        yield False
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _opened(file, wait=wait)
    except BlockingIOError:
        raise BecameError(
            f"{_holder(file)} is at work in {file.parent}; wait for it or choose another --out."
        ) from None
    except OSError as error:
        raise BecameError(f"cannot write {file}: {error.strerror}.") from None
    try:
        yield True
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _opened(file: Path, *, wait: bool) -> int:
    """Return a handle of the locked file."""
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, operation)
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever held it has just removed it


def _holder(file: Path) -> str:
    try:
        return f"another process ({int(file.read_text())})"
    except (OSError, ValueError):
        return "another process"
