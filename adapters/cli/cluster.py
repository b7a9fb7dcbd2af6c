"""Runs carried out on a Dask cluster: a task for each run, in a process of its own on the machine of a worker.

The folder of results must be on a disk that all machines share. When a worker dies, the scheduler gives its run to
another, which goes on from the last checkpoint. Messages come back as events of the scheduler, under a topic of this
command, and the last one of a run as the result of its task.
"""

import os
import queue
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from adapters.cli.display import LOGGER
from adapters.cli.jobs import Job
from adapters.cli.worker import LAST, Message, WorkerProcess, order_of
from adapters.runs.cluster import (
    CONNECT,
    Future,
    check_versions,
    config,
    connected,
    get_worker,
    sentence_on,
    threads_by_host,
)
from became_core import BecameError, __version__

__all__ = ["ClusterPool", "carry_out"]

# On a worker: the processes at work for each command, by its topic; and the topics of commands that were stopped.
_PROCESSES: dict[str, set[WorkerProcess]] = {}
_STOPPED: set[str] = set()


class ClusterPool:
    """The workers of a Dask cluster; the scheduler decides which of them carries out which run, and when."""

    def __init__(self, scheduler: str, out: Path) -> None:
        """Prepare to connect.

        Args:
            scheduler: the scheduler's address, or the path of its scheduler file.
            out: the folder of all runs.
        """
        self._scheduler = scheduler
        self._topic = f"became-{uuid.uuid4().hex}"
        # A file that a worker sees if it sees our folder. Its name does not come from a clock: hosts may share those.
        self._mark = out.absolute() / f".{self._topic}"
        self._inbox: queue.SimpleQueue[tuple[str, Message]] = queue.SimpleQueue()
        self._futures: dict[str, Future] = {}
        self._begun: set[str] = set()
        self._slots: dict[str, int] = {}

    def __enter__(self) -> Self:
        """Connect to the scheduler, and see whether its workers can do what they will be asked to.

        Raises:
            BecameError: if there is no scheduler, or a worker has another version of this package.
        """
        self._client = connected(self._scheduler)
        try:
            self._slots = threads_by_host(self._client)
            if not self._slots:
                LOGGER.warning("the scheduler at %s has no workers yet; the runs wait for one.", self._scheduler)
            check_versions(self._client)
            self._mark.touch()
        except BaseException:
            self._client.close()
            raise
        self._client.subscribe_topic(self._topic, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the cluster; what is still at work there is told to save its run."""
        with suppress(OSError, BecameError, TimeoutError):
            if any(not future.done() for future in self._futures.values()) and self._client.status == "running":
                self.stop()
        self._client.close(timeout=CONNECT)
        self._mark.unlink(missing_ok=True)

    def start(self, job: Job) -> bool:
        """Give a run to the scheduler, which keeps it until a worker is free."""
        name = job.run.name
        order = {**order_of(job), "mark": str(self._mark), "topic": self._topic, "slots": self._slots}
        # The first that was asked for comes first.
        priority = -len(self._futures)
        key = f"{name}-{uuid.uuid4().hex}"
        future = self._client.submit(carry_out, name, order, key=key, pure=False, priority=priority)
        self._futures[name] = future
        future.add_done_callback(lambda done: self._take(name, done))
        return True

    def _hear(self, event: tuple[float, Any]) -> None:
        name, *message = event[1]
        self._begun.add(name)
        self._inbox.put((name, tuple(message)))

    def _take(self, name: str, future: Future) -> None:
        """Take what came of a task: the last message about its run."""
        if future.status == "finished":
            kind, text = future.result()
            self._inbox.put((name, (kind, text)))
        elif future.status == "error":
            why = sentence_on(future.exception(), "what it had saved is there")
            self._inbox.put((name, ("failed", why)))
        # A task that is cancelled was so by `stop`, or its scheduler is gone: `message` looks for that.

    def message(self, timeout: float) -> tuple[str, Message] | None:
        """Return the next message of any worker.

        Raises:
            BecameError: if the scheduler is gone.
        """
        try:
            return self._inbox.get(timeout=timeout)
        except queue.Empty:
            if self._client.status != "running":
                raise BecameError(
                    f"the scheduler at {self._scheduler} is gone; each run is saved after its last whole epoch, and "
                    "the same command goes on from there."
                ) from None
            return None

    def stop(self) -> None:
        """Take back the runs that no worker is at work on, and let workers save the others."""
        at_work = {key for keys in self._client.processing().values() for key in keys}
        for name, future in self._futures.items():
            if (name not in self._begun or future.key not in at_work) and not future.done():
                future.cancel()
                why = "its worker is gone; what it had saved is there" if name in self._begun else "it had not begun"
                self._inbox.put((name, ("stopped", why)))
        self._client.run(_stop, self._topic, on_error="ignore")


def carry_out(name: str, order: dict[str, Any]) -> Message:
    """Carry out a run in a process on a worker's machine, and return the last message about it; a task of Dask."""
    worker, topic = get_worker(), order["topic"]
    if order["version"] != __version__:
        has = f"has version {__version__} of this package, not {order['version']}"
        return "failed", f"the worker {worker.address} {has}; install the same."
    if topic in _STOPPED:
        return "stopped", "it had not begun"
    if not Path(order["mark"]).exists():
        return "failed", f"the worker {worker.address} does not see {order['out']}; all must share the disk of --out."
    host = worker.address.partition("://")[2].rpartition(":")[0]
    order["share"] = max(order["slots"].get(host, 0), worker.state.nthreads)
    # A nanny sets one thread for all that its worker calculates, which here does not calculate itself.
    by_nanny = {key: str(value) for key, value in config.get("distributed.nanny.pre-spawn-environ").items()}
    process = WorkerProcess({key: value for key, value in os.environ.items() if by_nanny.get(key) != value})
    _PROCESSES.setdefault(topic, set()).add(process)
    if topic in _STOPPED:  # since the look above
        process.stop()
    last: Message = ("failed", "it said nothing")
    try:
        for message in process.messages(order):
            if message[0] == "failed":
                last = ("failed", f"on {worker.address}: {message[1]}")
            elif message[0] in LAST:
                last = message
            else:
                worker.log_event(topic, [name, *_plain(message)])
    finally:
        _PROCESSES[topic].discard(process)
        process.close()
    return last


def _plain(message: Message) -> Message:
    """A message whose values a scheduler can carry."""
    if message[0] != "event":
        return message
    kind, event, values = message
    return (
        kind,
        event,
        {name: sorted(value) if isinstance(value, frozenset) else value for name, value in values.items()},
    )


def _stop(topic: str) -> None:
    """Let a worker's processes save the runs of a command, and end with them."""
    _STOPPED.add(topic)
    for process in tuple(_PROCESSES.get(topic, ())):
        process.stop()
