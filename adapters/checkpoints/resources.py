"""What a merge may use of the machine: threads that work beside each other, memory, and open files."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

if sys.platform != "win32":
    import resource

__all__ = ["TOO_MANY_FILES", "allow_files", "held_already", "in_order", "resident"]

TOO_MANY_FILES = "more files are open than the system allows this process; allow more by ulimit -n"
# What macOS allows at most where it says that there is no limit.
UNLIMITED = 10240

# What a process of the command holds before it reads anything is below this, in bytes.
COMMAND = 128 * 2**20

A = TypeVar("A")
B = TypeVar("B")


def in_order(function: Callable[[A], B], tasks: Iterable[A], workers: int, ahead: int) -> Iterator[B]:
    """Yield a function's results in the order of the tasks, which threads carry out beside each other.

    Args:
        function: of one task.
        tasks: in order.
        workers: how many threads.
        ahead: how many results may wait.
    """
    if workers == 1 or ahead == 1:
        yield from map(function, tasks)
        return
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(min(workers, ahead)) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def held_already() -> int:
    """Return the bytes that count as held before a merge begins.

    What is above the command's own belongs to the program that calls us, which may have a whole framework loaded.
    """
    return min(resident(), COMMAND)


def resident() -> int:
    """Return the bytes of memory that this process holds beside the page cache; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0][1]) * 1024 if lines else 0


def allow_files() -> None:
    """Let this process open as many files as it may allow itself: a model of many shards has them all open."""
    if sys.platform == "win32":  # where there is no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = UNLIMITED if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # where it is not allowed after all, the next file that is opened says so
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
