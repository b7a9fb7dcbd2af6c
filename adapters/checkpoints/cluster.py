"""A merge whose blocks are measured and written by the workers of a Dask cluster, on a disk that all machines share.

A task is a range of blocks. It returns a few numbers for each block, and no weights pass through the scheduler: a
worker reads the inputs, and writes its blocks at their places in the hidden files of the merge. A range that is done
twice, because its worker died or seemed to, has the same bytes both times.

Convention: blocks are known by their numbers in a pass, which are the same in every process.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from adapters.checkpoints.executors import Written, written
from adapters.checkpoints.job import Block, Job, Measured
from adapters.checkpoints.opening import open_job
from adapters.checkpoints.plan import MergePlan
from adapters.checkpoints.rule import Solution
from adapters.checkpoints.tensors import SLAB, SuspendedError
from adapters.checkpoints.write import (
    FileState,
    Layout,
    OutputFolder,
    file_states,
    identity,
    layout_of_models,
)
from adapters.runs.cluster import (
    CONNECT,
    Future,
    KilledWorker,
    check_versions,
    connected,
    fire_and_forget,
    get_worker,
    sentence_on,
    threads_by_host,
)
from became_core import BecameError, __version__

__all__ = ["Cluster"]

LOGGER = logging.getLogger("became")
# The least number of elements of a task: a fraction of a second, beside which Dask's millisecond does not count.
PART = 32 * SLAB
KEPT = "what is done stays, and the same command goes on from there"


@dataclass(frozen=True)
class Order:
    """What a worker must know of a merge to measure and write its blocks.

    Attributes:
        version: of this package.
        plan: with absolute paths.
        out: the folder that will appear, as an absolute path.
        merge: what the merge is known by.
        files: all inputs, as the command sees them.
        memory: the bytes that a worker's process may hold beside the page cache.
    """

    version: str
    plan: MergePlan
    out: Path
    merge: str
    files: tuple[FileState, ...]
    memory: int


class Cluster:
    """The workers of a Dask cluster, which carry out the two passes."""

    def __init__(self, job: Job, folder: OutputFolder, scheduler: str, memory: int) -> None:
        """Prepare to connect.

        Args:
            job: the merge.
            folder: where it is made.
            scheduler: the scheduler's address, or the path of its scheduler file.
            memory: the bytes that each worker's process may hold beside the page cache.
        """
        self._folder, self._scheduler = folder, scheduler
        files = tuple(file_states(job))
        self._order = Order(__version__, job.plan.absolute(), folder.out.absolute(), identity(job), files, memory)

    def __enter__(self) -> Self:
        """Connect to the scheduler.

        Raises:
            BecameError: if there is none, or a worker has another version of this package.
        """
        self._client = connected(self._scheduler)
        try:
            check_versions(self._client)
            if not threads_by_host(self._client):
                LOGGER.warning("the scheduler at %s has no workers yet; the merge waits for one.", self._scheduler)
        except BaseException:
            self._client.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the cluster, which then drops the tasks that have not begun; its workers close the inputs."""
        with suppress(OSError):
            if self._client.status == "running":
                for worker in self._client.scheduler_info(n_workers=-1)["workers"]:
                    where: dict[str, Any] = {"workers": [worker], "allow_other_workers": True}  # should it be gone
                    fire_and_forget(self._client.submit(_close, **where, priority=1, pure=False))
        self._client.close(timeout=CONNECT)

    def measure(self, blocks: Sequence[Block], first: int) -> Iterator[Measured]:
        """Yield what each block adds to the rule's sums, in order."""
        return self._shared_out(blocks, first, None)

    def write(self, blocks: Sequence[Block], first: int, solution: Solution) -> Iterator[Written]:
        """Yield the prints of each block that was written, in order."""
        # Headers, and the zeros with which a system may have given the files their lengths, must be on the disk before
        # another machine writes there: this one could write them over its bytes later.
        self._folder.sync()
        return self._shared_out(blocks, first, replace(solution, groups={}))

    def _shared_out(self, blocks: Sequence[Block], first: int, solution: Solution | None) -> Iterator[Any]:
        ranges = list(parts_of(blocks, first))
        if not ranges:
            return
        begins, ends = zip(*ranges, strict=True)
        futures = self._client.map(carry_out, begins, ends, order=self._order, solution=solution, pure=False)
        for number, future in enumerate(futures):
            yield from self._result(future)
            futures[number] = None  # the scheduler may forget it

    def _result(self, future: Future) -> Any:
        """Return what came of a task.

        Raises:
            SuspendedError: if the scheduler is gone, or several workers died.
            BecameError: what the task raised; or an OSError, likewise.
        """
        try:
            return future.result()
        except (KilledWorker, ModuleNotFoundError, AttributeError) as error:
            raise SuspendedError(f"a part of the merge failed: {sentence_on(error, KEPT)}") from None
        except Exception:
            if future.status == "error":  # it is the task's own
                raise
            raise SuspendedError(f"the scheduler at {self._scheduler} is gone; {KEPT}.") from None


def parts_of(blocks: Sequence[Block], first: int) -> Iterator[tuple[int, int]]:
    """Yield the first block of each task and the one after its last, from a block on.

    Example:
        >>> from types import SimpleNamespace
        >>> whole: list = [SimpleNamespace(start=0, stop=PART // 2)] * 5
        >>> list(parts_of(whole, 1))
        [(1, 3), (3, 5)]
    """
    begin, elements = first, 0
    for number in range(first, len(blocks)):
        elements += blocks[number].stop - blocks[number].start
        if elements >= PART or number == len(blocks) - 1:
            yield begin, number + 1
            begin, elements = number + 1, 0


def carry_out(begin: int, end: int, *, order: Order, solution: Solution | None) -> list[Measured] | list[Written]:
    """Measure blocks on a worker, or write them if there is a solution; a task of Dask."""
    opened = _opened(order)
    if solution is None:
        return [opened.measure(block) for block in opened.measured[begin:end]]
    blocks = opened.written[begin:end]
    folder = OutputFolder(order.out, opened.layout)
    with folder.joined(order.merge, {opened.layout.places[block.leaf.name][0] for block in blocks}):
        return [opened.write(folder, block, solution) for block in blocks]


@dataclass(frozen=True)
class _Opened:
    """A merge that a worker has open.

    Attributes:
        job: the merge.
        layout: where everything will lie.
        measured: the blocks of pass 1.
        written: the blocks of pass 2.
        room: for as many blocks as fit into memory; a leaf with factors takes all of it.
    """

    job: Job
    layout: Layout
    measured: Sequence[Block]
    written: Sequence[Block]
    room: threading.Semaphore

    def measure(self, block: Block) -> Measured:
        with self.room:
            return self.job.measure(block)

    def write(self, folder: OutputFolder, block: Block, solution: Solution) -> Written:
        with self.room:
            return written(self.job, folder, block, solution)


_OPENING = threading.Lock()


def _opened(order: Order) -> _Opened:
    with _OPENING:
        return _open(order)


@lru_cache(maxsize=1)
def _open(order: Order) -> _Opened:
    """Return a merge with its inputs open, once it is known that they are those of the command.

    Raises:
        SuspendedError: if this worker has another version, does not see the same files, or cannot open them.
    """
    worker = get_worker()
    if order.version != __version__:
        has = f"has version {__version__} of this package, not {order.version}"
        raise SuspendedError(f"the worker {worker.address} {has}; install the same.")
    share = "all must share the disk of the models and of the result"
    for file, *state in order.files:
        try:
            found = Path(file).stat()
        except OSError:
            raise SuspendedError(f"the worker {worker.address} does not see {file}; {share}.") from None
        if [found.st_size, found.st_mtime_ns] != state:
            seen = f"another {file} than the command does ({found.st_size} bytes; the command sees {state[0]})"
            raise SuspendedError(f"the worker {worker.address} sees {seen}; {share}.")
    try:
        job = open_job(order.plan)
        ahead = job.ahead(order.memory, worker.state.nthreads)
    except BecameError as error:  # the command could
        raise SuspendedError(f"the worker {worker.address} cannot take part: {error}") from None
    layout = layout_of_models(job)
    folder = OutputFolder(order.out, layout)
    if not folder.is_of(order.merge):
        raise SuspendedError(f"the worker {worker.address} does not see {folder.folder}; {share}.")
    measured, room = list(job.measured_blocks(job.measured)), threading.Semaphore(1 if job.factored else ahead)
    return _Opened(job, layout, measured, job.blocks(layout.leaves), room)


def _close() -> None:
    """Close the inputs of the merge that a worker has open."""
    with _OPENING:
        _open.cache_clear()
