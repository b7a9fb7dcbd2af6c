"""Runs carried out by several workers at the same time: processes of this machine, or the workers of a Dask cluster.

``PoolEngine`` is the engine: it gives runs to a ``WorkerPool``, whose workers carry them out, and shows what they say.

Convention: a run is known by its name, which is unique among those of a command.
"""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from adapters.cli.display import LOGGER, Display
from adapters.cli.interruption import InterruptedRun, Interruption
from adapters.cli.jobs import Job, Load
from adapters.cli.running import Engine, one_after_another
from adapters.cli.worker import LAST, Message, WorkerProcess, order_of
from adapters.runs import RunResult
from adapters.runs.directory import read_result
from adapters.runs.events import Events
from became_core import BecameError

__all__ = ["LocalPool", "PoolEngine", "WorkerPool", "engine_of", "slots_of"]

# Seconds: how often signals and the pool are looked at, and after how long a run is tried again that another process
# works on.
LOOK, AGAIN = 0.2, 1.0


class WorkerPool(Protocol):
    """Workers that carry out runs, as a context; at its end none is left at work."""

    def __enter__(self) -> Self:
        """Get ready."""

    def __exit__(self, *error: object) -> None:
        """End the workers, or leave them, if they are not ours."""

    def start(self, job: Job) -> bool:
        """Give a run to a worker; return whether one could take it."""

    def message(self, timeout: float) -> tuple[str, Message] | None:
        """Return the name of a run and what is said of it; None if nothing is within so many seconds.

        Raises:
            BecameError: if the pool is lost, so that nothing will ever be said again.
        """

    def stop(self) -> None:
        """Let all workers save what they work on, and end with it; each then says so."""


class LocalPool:
    """Processes of this machine, each of which carries out one run at a time."""

    def __init__(self, workers: int, environment: dict[str, str]) -> None:
        """Start nothing yet.

        Args:
            workers: how many processes there may be.
            environment: of each process.
        """
        self._most = workers
        self._environment = environment
        self._idle: list[WorkerProcess] = []
        self._working: list[WorkerProcess] = []
        self._inbox: queue.SimpleQueue[tuple[WorkerProcess, str, Message]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, *error: object) -> None:
        """End all processes."""
        for process in self._working:  # only after a second signal, or a mistake of ours
            process.stop()
            process.kill()
        for process in (*self._working, *self._idle):
            process.close()

    def start(self, job: Job) -> bool:
        """Give a run to an idle process, or to a new one."""
        if len(self._working) == self._most:
            return False
        while self._idle and not self._idle[-1].usable:
            self._idle.pop().close()
        process = self._idle.pop() if self._idle else WorkerProcess(self._environment)
        self._working.append(process)
        threading.Thread(target=self._listen, args=(process, job.run.name, order_of(job)), daemon=True).start()
        return True

    def _listen(self, process: WorkerProcess, name: str, order: dict[str, Any]) -> None:
        try:
            for message in process.messages(order):
                self._inbox.put((process, name, message))
        except Exception as error:  # or nobody would ever hear of this run
            self._inbox.put((process, name, ("failed", f"{type(error).__name__}: {error}")))

    def message(self, timeout: float) -> tuple[str, Message] | None:
        """Return the next message of any process."""
        try:
            process, name, message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None
        if message[0] in LAST:
            self._working.remove(process)
            self._idle.append(process)
        return name, message

    def stop(self) -> None:
        """Stop all processes that are at work."""
        for process in tuple(self._working):
            process.stop()


@dataclass(frozen=True)
class PoolEngine:
    """An engine that has a pool carry out the runs.

    A run that fails is shown, and the others go on. A run that another process works on is waited for.

    Attributes:
        pool: returns the pool for the folder of all runs.
    """

    pool: Callable[[Path], AbstractContextManager[WorkerPool]]

    def __call__(self, jobs: Sequence[Job], load: Load, display: Display) -> list[RunResult | None]:
        """Carry out the runs; see ``Engine``."""
        states = _RunStates(display, {job.run.name: job for job in jobs})
        saved = "every run is saved after its epoch first"
        with (
            Interruption(saved) as interruption,
            self.pool(jobs[0].run.out) as pool,
            display.several(len(jobs)),
            states.shown,
        ):
            told = False
            while states.waiting or states.working:
                if interruption.received is not None:
                    states.waiting.clear()
                    if not told:
                        pool.stop()
                    told = True
                states.start_waiting(pool)
                came = pool.message(LOOK)
                if came is not None:
                    states.receive(*came)
            if interruption.received is not None and states.unfinished:
                raise InterruptedRun(states.summary(), interruption.received)
        return [states.results.get(job.run.name) for job in jobs]


@dataclass
class _RunStates:
    """What is known of each run while a pool works on them."""

    display: Display
    jobs: dict[str, Job]
    waiting: deque[tuple[str, float]] = field(default_factory=deque)
    working: set[str] = field(default_factory=set)
    results: dict[str, RunResult] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    saved: int = 0
    shown: ExitStack = field(default_factory=ExitStack)
    _views: dict[str, tuple[ExitStack, Events]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.waiting.extend((name, 0.0) for name in self.jobs)
        self.shown.callback(self._close_views)

    @property
    def unfinished(self) -> int:
        """How many runs have neither a result nor failed."""
        return len(self.jobs) - len(self.results) - len(self.failed)

    def start_waiting(self, pool: WorkerPool) -> None:
        """Give the pool all runs that it can take now."""
        for _ in range(len(self.waiting)):
            name, earliest = self.waiting.popleft()
            if time.monotonic() < earliest:
                self.waiting.append((name, earliest))
            elif pool.start(self.jobs[name]):
                self.working.add(name)
            else:
                self.waiting.appendleft((name, earliest))
                return

    def receive(self, name: str, message: Message) -> None:
        """Take in what was said of a run."""
        kind, *values = message
        if name not in self.working:  # it came late, after the run was done with
            return
        if kind == "watch":
            self._close_view(name)
            view = ExitStack()
            self._views[name] = view, view.enter_context(self.display.watching(self.jobs[name].run, *values))
        elif kind == "event" and name in self._views:
            event, of_event = values
            self._views[name][1].add(event, **of_event)
        elif kind == "log":
            self._tell(*values)
        elif kind in LAST:
            self._close_view(name)
            self.working.discard(name)
            self._done(name, kind, *values)

    def _done(self, name: str, kind: str, text: str) -> None:
        run = self.jobs[name].run
        if kind == "busy":
            if f"busy {name}" not in self._told:
                self._told.add(f"busy {name}")
                self.display.note(f"{name}  another process works on it, and it is waited for.")
            self.waiting.append((name, time.monotonic() + AGAIN))
        elif kind == "stopped" and not run.results_file.exists():
            self.saved += run.started
        elif kind == "failed":
            self.failed.add(name)
            self.display.failed(run, text)
        else:
            try:
                self.results[name] = read_result(run.results_file)
            except BecameError as error:
                self.failed.add(name)
                self.display.failed(run, str(error))
            else:
                self.display.result(run, self.results[name], before=False)

    def _tell(self, level: int, text: str) -> None:
        """Log a message of a worker; one that several workers send is shown once."""
        if text not in self._told:
            self._told.add(text)
            LOGGER.log(level, "%s", text)

    def _close_view(self, name: str) -> None:
        if name in self._views:
            self._views.pop(name)[0].close()

    def _close_views(self) -> None:
        for name in tuple(self._views):
            self._close_view(name)

    def summary(self) -> str:
        """Return how far the runs are, for the message of a signal."""
        rest = self.unfinished - self.saved
        parts = {"finished": len(self.results), "saved on the way": self.saved, "not begun": rest}
        parts["failed"] = len(self.failed)
        told = [f"{count} {what}" for what, count in parts.items() if count]
        return f"of {len(self.jobs)} runs {', '.join(told)}"


def engine_of(workers: int | None, scheduler: str | None) -> tuple[Engine, int]:
    """Return what carries out the runs, and among how many of them the cores of this machine are divided.

    Args:
        workers: how many processes of this machine; None for this process alone.
        scheduler: the address or the file of a Dask cluster's scheduler; None for this machine alone.

    Raises:
        BecameError: if both are given, there would be no worker, Dask is missing, or this process shares runs.
    """
    if workers is None and scheduler is None:
        return one_after_another, 1
    for name, what in (("TORCHELASTIC_RUN_ID", "torchrun"), ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS")):
        if name in os.environ:
            raise BecameError(
                f"--workers and --scheduler carry out whole runs, and {what} shares one; use one of them."
            )
    if workers is not None and scheduler is not None:
        raise BecameError("--workers are processes of this machine, and --scheduler has workers of its own; give one.")
    if scheduler is not None:
        from adapters.cli.cluster import ClusterPool  # needs Dask, which is an extra

        return PoolEngine(lambda out: ClusterPool(scheduler, out)), 1
    most = workers or 0
    if most < 1:
        raise BecameError(f"--workers is {most}; it must be at least 1.")
    environment = dict(os.environ)  # as it is before a framework is set up in this process
    return PoolEngine(lambda out: LocalPool(most, environment)), most


def slots_of(scheduler: str) -> int:
    """Return how many runs the workers of a Dask cluster carry out at the same time, at least 1.

    Raises:
        BecameError: as ``ClusterPool`` does.
    """
    from adapters.runs.cluster import connected, threads_by_host

    with connected(scheduler) as client:
        return max(1, sum(threads_by_host(client).values()))
