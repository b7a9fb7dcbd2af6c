"""``torchrun -m adapters.torch.run``: processes that share runs as ``adapters/backend/processes.py`` has it.

| what happens | what it leads to |
| --- | --- |
| a process dies | the others' next sum fails at once; one of them says so, the first if it lives, and all end |
| a process or the network stalls | the same after ``BECAME_TIMEOUT`` seconds, 60 unless it is set |
| a signal | the first process stops after the epoch; the others ignore it and end with the first |

Convention: what is sent about a run goes by gloo, from CPU to CPU, and waits for as long as the first process takes to
prepare; sums go by NCCL between GPUs.
"""

import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from adapters.backend import Backend, LostProcessError, Processes, timeout_asked_for
from adapters.torch.learner import TorchLearner
from adapters.torch.share import ProcessShare
from became_core import BecameError

__all__ = ["TorchProcesses", "is_one_of_several", "met"]

PATIENCE = timedelta(days=7)  # for the first process, which may read data or wait for a lock
SAID = "became: the first process has ended and has said why"
BEATS = "became: a number that grows for as long as the first process lives"
BEAT = 0.5  # seconds from one beat to the next


def is_one_of_several() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@dataclass
class TorchProcesses(Processes):
    """The processes that torchrun started, as one of them sees them.

    Attributes:
        orders: the group by which one process tells the others something.
        store: what all have.
        is_over: set once the first process need no longer show that it lives.
    """

    orders: Any = None
    store: Any = None
    is_over: Event = field(default_factory=Event)

    def send(self, value: Any, source: int = 0) -> Any:
        """Return the value that one process gives."""
        box = [value]
        try:
            distributed.broadcast_object_list(box, src=source, group=self.orders)
        except RuntimeError as error:
            raise LostProcessError(self.count, self.timeout) from error
        return box[0]

    def built(self, network: str, stream: Any, device: str, seed: int, **options: Any) -> TorchLearner:
        """Return a fresh learner on this process's device: of several GPUs in a machine, each process has one."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda:"):
            raise BecameError(
                f"several processes cannot all have the device '{device}'; give cuda, and each takes its own."
            )
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
        learner = self.backend.learner(network, stream, device, seed, **options)
        assert isinstance(learner, TorchLearner)
        learner.check_divisible()
        return learner

    def share(self, learner: Any) -> None:
        """Let a learner do this process's share."""
        learner.share = ProcessShare(self.rank, self.count, self.timeout)

    def packed(self, values: dict[str, Any]) -> bytes:
        """Return values as PyTorch writes them."""
        written = io.BytesIO()
        torch.save(values, written)
        return written.getvalue()

    def unpacked(self, packed: bytes, learner: Any) -> dict[str, Any]:
        """Return the values."""
        values: dict[str, Any] = torch.load(io.BytesIO(packed), map_location=learner.device, weights_only=False)
        return values

    def conditions(self) -> tuple[int | None, bool]:
        """Return the number of threads, and whether operations are deterministic."""
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def tell_why(self) -> None:
        """Let the others know, by the store, and stop showing that this process lives."""
        self.is_over.set()
        with suppress(RuntimeError):  # of a store that was in the first process, and has died with it
            self.store.set(SAID, "yes")

    def is_told(self) -> bool:
        """Whether the first process, or another one of those that are left, says why all end."""
        with suppress(RuntimeError):  # likewise
            if _within(3, lambda: self.store.check([SAID])):
                return True
            return bool(self.store.add(f"{SAID}, or another", 1) > 1)
        return False

    def is_first_alive(self) -> bool:
        """Whether the first process lives, which it shows by the store."""
        with suppress(RuntimeError):  # likewise
            beats = self.store.add(BEATS, 0)
            return _within(6 * BEAT, lambda: self.store.add(BEATS, 0) > beats)
        return False

    def beat(self) -> None:
        """Show, by the store and in a thread of its own, that this process lives."""

        def show() -> None:
            with suppress(RuntimeError):  # of a store that has gone before this process
                while not self.is_over.wait(BEAT):
                    self.store.add(BEATS, 1)

        Thread(target=show, daemon=True).start()


def _within(seconds: float, happened: Callable[[], bool]) -> bool:
    """Wait until something has happened; return False if it has not after so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if happened():
            return True
        time.sleep(0.05)
    return False


def met(backend: Backend, words: list[str]) -> Processes:
    """Wait for all processes; return what this one works with.

    Raises:
        BecameError: if the processes are not alike, or ``BECAME_TIMEOUT`` is no number.
    """
    timeout = timeout_asked_for()
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a sum that comes too late raises an error
    sums = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        sums = "cpu:gloo,cuda:nccl"
    store, rank, count = next(rendezvous("env://"))
    distributed.init_process_group(sums, timeout=timedelta(seconds=timeout), store=store, rank=rank, world_size=count)
    orders = distributed.new_group(backend="gloo", timeout=PATIENCE)
    processes = TorchProcesses(backend, rank, count, timeout, orders=orders, store=store)
    processes.check_alike(command=" ".join(words), torch=torch.__version__, Python=sys.version.split()[0])
    if rank == 0:
        processes.beat()
    return processes
