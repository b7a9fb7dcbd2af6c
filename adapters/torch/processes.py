"""``torchrun -m adapters.torch.run``: the first process runs the command, and the others share the work of its runs.

The first process reads options and data, writes files, prints and decides. When it begins or resumes a run, it sends
the others what the run is made of, and from then on all of them call ``learn`` with the same arguments. They stay
alike, because all random numbers are functions of the seed and all sums are those of all processes (``share.py``).

| what happens | what it leads to |
| --- | --- |
| a process dies | the others' next sum fails at once; one of them says so, and all end |
| a process or the network stalls | the same after ``BECAME_TIMEOUT`` seconds, 60 unless it is set |
| a signal | the first process stops after the epoch; the others ignore it and end with the first |

Convention: ranks count from 0, and messages count processes from 1. What is sent about a run goes by gloo, from CPU to
CPU, and waits for as long as the first process takes to prepare; sums go by NCCL between GPUs.
"""

import io
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from adapters.backend import Backend
from adapters.torch.learner import TorchLearner
from adapters.torch.share import LostProcessError, ProcessShare
from became_core import BecameError
from became_core.continual import Learner, RunRecord, learn

__all__ = ["is_one_of_several", "run_in_processes", "timeout_asked_for"]

PATIENCE = timedelta(days=7)  # for the first process, which may read data or wait for a lock
SAID = "became: the first process has ended and has said why"


def is_one_of_several() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def timeout_asked_for() -> float:
    """Return the seconds to wait for another process's part of a sum.

    Raises:
        BecameError: if ``BECAME_TIMEOUT`` is no number above 0.
    """
    text = os.environ.get("BECAME_TIMEOUT", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise BecameError(f"BECAME_TIMEOUT is '{text}'; it must be a number of seconds above 0.")
    return seconds


@dataclass(frozen=True)
class Order:
    """What a process must know to take part in a run.

    Attributes:
        builder: the arguments of the builder of learners; the stream is among them.
        options: its options.
        arguments: those of ``learn`` after the stream.
        state: the state to go on from, if any, and the seed, as PyTorch writes them: a process reads the arrays onto
            its own device.
        threads: with how many threads each process computes.
        repeatable: whether only operations are used that give the same bits every time.
    """

    builder: tuple[Any, ...]
    options: dict[str, Any]
    arguments: tuple[Any, ...]
    state: bytes
    threads: int
    repeatable: bool


@dataclass
class Processes:
    """The processes of one command, as one of them sees them.

    Attributes:
        backend: PyTorch, for one process.
        share: what this process does of the work.
        orders: the group by which the first process tells the others what to do.
        busy: whether the others may be in the middle of a run.
        made: how each learner was built.
    """

    backend: Backend
    share: ProcessShare
    orders: Any
    busy: bool = False
    made: "WeakKeyDictionary[Learner, tuple[tuple[Any, ...], dict[str, Any]]]" = field(
        default_factory=WeakKeyDictionary
    )

    def learner(self, network: str, stream: Any, device: str, seed: int, **options: Any) -> TorchLearner:
        """Return a fresh learner on this process's device.

        Raises:
            BecameError: if the run cannot be shared.
        """
        learner = self.backend.learner(network, stream, _own_device(device), seed, **options)
        assert isinstance(learner, TorchLearner)
        learner.check_divisible()
        self.made[learner] = (network, stream, device, seed), options
        return learner

    def learn(self, learner: Learner, stream: Any, method: Any, training: Any, **options: Any) -> RunRecord:
        """Learn as ``became_core.continual.learn`` does, with all processes; only the first one has callbacks."""
        builder, how = self.made[learner]
        told = io.BytesIO()
        torch.save({name: options.get(name) for name in ("seed", "state")}, told)
        self.busy = True
        repeatable = torch.are_deterministic_algorithms_enabled()
        self.tell(Order(builder, how, (method, training), told.getvalue(), torch.get_num_threads(), repeatable))
        learner.share = self.share
        record = learn(learner, stream, method, training, **options)
        self.busy = False
        return record

    def tell(self, order: Order | None) -> None:
        """Send the others what to do next; None to end."""
        self._send([order])

    def follow(self) -> None:
        """Take part in runs until the first process ends."""
        while (order := self._send([None])) is not None:
            # What every process computes by itself, such as alpha, must have the same bits in all.
            self.backend.use_threads(order.threads)
            if order.repeatable:
                self.backend.repeat_exactly()
            learner = self.learner(*order.builder, **order.options)
            learner.share = self.share
            # It comes from the first process of the same command, as all else that these processes exchange.
            state = torch.load(io.BytesIO(order.state), map_location=learner.device, weights_only=False)
            learn(learner, order.builder[1], *order.arguments, **state)

    def _send(self, box: list[Any]) -> Any:
        try:
            distributed.broadcast_object_list(box, src=0, group=self.orders)
        except RuntimeError as error:
            raise LostProcessError(f"one of the {self.share.count} processes ended; all have stopped.") from error
        return box[0]


def _own_device(name: str) -> str:
    """Return the device of this process: of several GPUs in a machine, each process has one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:"):
        raise BecameError(f"several processes cannot all have the device '{name}'; give cuda, and each takes its own.")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


def _check_alike(arguments: list[str], count: int, orders: Any) -> None:
    """Raise a BecameError, in every process, if one was given another command than the first or has other versions."""
    own = {"command": " ".join(arguments), "torch": torch.__version__, "Python": sys.version.split()[0]}
    of_all: list[Any] = [None] * count
    distributed.all_gather_object(of_all, own, group=orders)
    for number, theirs in enumerate(of_all):
        for name, value in theirs.items():
            if value != of_all[0][name]:
                raise BecameError(
                    f"process {number + 1} of {count} has {name} '{value}', and process 1 has '{of_all[0][name]}'; "
                    "start all alike."
                )


def run_in_processes(backend: Backend, arguments: list[str] | None = None) -> int:
    """Run the command in the first process, and follow it in the others; return the exit status.

    Args:
        backend: PyTorch, for one process.
        arguments: the words of the command; those of this process if None.
    """
    words = sys.argv[1:] if arguments is None else arguments
    is_first = os.environ["RANK"] == "0"
    if not is_first:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        warnings.simplefilter("ignore")
    try:
        processes, store = _met(backend, words)
    except (BecameError, RuntimeError, ValueError) as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return _lead(backend, processes, store, words) if is_first else _follow(processes, store)


def _met(backend: Backend, words: list[str]) -> tuple[Processes, Any]:
    """Wait for all processes; return what this one works with, and a store that all have.

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
    _check_alike(words, count, orders)
    return Processes(backend, ProcessShare(rank, count, timeout), orders), store


def _lead(backend: Backend, processes: Processes, store: Any, words: list[str]) -> int:
    from adapters.cli.main import main

    try:
        return main(replace(backend, learner=processes.learner, learn=processes.learn), words)
    finally:
        with suppress(RuntimeError):
            store.set(SAID, "yes")
        if not processes.busy:
            with suppress(BecameError):
                processes.tell(None)


def _follow(processes: Processes, store: Any) -> int:
    own = f"process {processes.share.rank + 1} of {processes.share.count}"
    try:
        processes.follow()
    except LostProcessError as error:
        if not _is_said(store):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except BecameError as error:
        if not _is_said(store):  # the first process mostly has the same error, and says so
            print(f"error: {own}: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"error: {own} failed: {reason}", file=sys.stderr, flush=True)
        return 1
    return 0


def _is_said(store: Any) -> bool:
    """Whether the first process, or another one of those that are left, says why all end."""
    with suppress(RuntimeError):  # of a store that was in the first process, and has died with it
        until = time.monotonic() + 3
        while time.monotonic() < until:
            if store.check([SAID]):
                return True
            time.sleep(0.05)
        return bool(store.add(f"{SAID}, or another", 1) > 1)
    return False
