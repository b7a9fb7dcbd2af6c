"""Several processes that share runs: the first runs the command, and the others share the work of its runs.

The first process reads options and data, writes files, prints and decides. When it begins or resumes a run, it sends
the others what the run is made of, and from then on all of them call ``learn`` with the same arguments. They stay
alike, because all random numbers are functions of the seed and all sums are those of all processes.

A framework adds how processes meet, how one tells the others something, and how a learner shares its work.

Convention: ranks count from 0, and messages count processes from 1.
"""

import os
import signal
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from adapters.backend.entry import Backend
from adapters.backend.learner import NetworkLearner
from became_core import BecameError
from became_core.continual import Learner, RunRecord, learn
from became_core.errors import first_line

__all__ = ["LostProcessError", "Processes", "run_in_processes", "timeout_asked_for"]


class LostProcessError(BecameError):
    """Another process ended, or did not answer in time."""

    def __init__(self, count: int | None, timeout: float) -> None:
        """Say so of so many processes, if it is known how many, which wait for so many seconds."""
        super().__init__(
            f"one of the {count or 'several'} processes ended, or did not answer within {timeout:.0f} seconds; all "
            "have stopped, and the same command goes on from what was saved."
        )


def timeout_asked_for() -> float:
    """Return the seconds to wait for another process.

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
        state: the state to go on from, if any, and the seed, as the framework writes them: a process reads the arrays
            onto its own device.
        threads: with how many threads each process computes; None for those that it has.
        repeatable: whether only operations are used that give the same bits every time.
    """

    builder: tuple[Any, ...]
    options: dict[str, Any]
    arguments: tuple[Any, ...]
    state: bytes
    threads: int | None
    repeatable: bool


@dataclass
class Processes(ABC):
    """The processes of one command, as one of them sees them.

    Attributes:
        backend: the framework, for one process.
        rank: the number of this process.
        count: how many there are.
        timeout: for how many seconds they wait for each other.
        busy: whether the others may be in the middle of a run.
        made: how each learner was built.
    """

    backend: Backend
    rank: int
    count: int
    timeout: float = 60.0
    busy: bool = False
    made: "WeakKeyDictionary[Learner, tuple[tuple[Any, ...], dict[str, Any]]]" = field(
        default_factory=WeakKeyDictionary
    )

    # What a framework adds.

    @abstractmethod
    def send(self, value: Any, source: int = 0) -> Any:
        """Return the value that a process, the source, gives, in all processes.

        Raises:
            LostProcessError: if one has ended.
        """

    @abstractmethod
    def built(self, network: str, stream: Any, device: str, seed: int, **options: Any) -> NetworkLearner:
        """Return a fresh learner of this process, which communicates nothing yet.

        Raises:
            BecameError: if the run cannot be shared.
        """

    @abstractmethod
    def share(self, learner: Any) -> None:
        """Let a learner share its work with the other processes' ones from now on."""

    @abstractmethod
    def packed(self, values: dict[str, Any]) -> bytes:
        """Return values with the framework's arrays as bytes."""

    @abstractmethod
    def unpacked(self, packed: bytes, learner: Any) -> dict[str, Any]:
        """Return the values, with their arrays where the learner has its own."""

    @abstractmethod
    def conditions(self) -> tuple[int | None, bool]:
        """Return with how many threads this process computes, and whether it gives the same bits every time."""

    def failed(self, error: Exception) -> Exception:
        """Return what an error of the framework means: a LostProcessError, or the error itself."""
        return error

    def tell_why(self) -> None:  # noqa: B027 - a framework may have no way
        """Let the others know that this process says why all end."""

    def is_told(self) -> bool:
        """Whether another process says why all end."""
        return False

    def is_first_alive(self) -> bool:
        """Whether it is known that the first process lives."""
        return False

    # What is shared.

    def check_alike(self, **own: str) -> None:
        """Raise a BecameError, in every process, if one has other values than the first, by what they are."""
        first, *others = (self.send(own, source) for source in range(self.count))
        for number, theirs in enumerate(others):
            for name, value in theirs.items():
                if value != first[name]:
                    raise BecameError(
                        f"process {number + 2} of {self.count} has {name} '{value}', and process 1 has "
                        f"'{first[name]}'; start all alike."
                    )

    def learner(self, network: str, stream: Any, device: str, seed: int, **options: Any) -> NetworkLearner:
        """Return a fresh learner on this process's device; raises as ``built`` does."""
        learner = self.built(network, stream, device, seed, **options)
        self.made[learner] = (network, stream, device, seed), options
        return learner

    def learn(self, learner: Learner, stream: Any, method: Any, training: Any, **options: Any) -> RunRecord:
        """Learn as ``became_core.continual.learn`` does, with all processes; only the first one has callbacks."""
        builder, how = self.made[learner]
        state = self.packed({name: options.get(name) for name in ("seed", "state")})
        self.busy = True
        record = self._take_part(
            learner, Order(builder, how, (method, training), state, *self.conditions()), options.get("callbacks", ())
        )
        self.busy = False
        return record

    def follow(self) -> None:
        """Take part in runs until the first process ends."""
        while (order := self.send(None)) is not None:
            # What every process computes by itself, such as alpha, must have the same bits in all.
            self.backend.use_threads(order.threads)
            if order.repeatable:
                self.backend.repeat_exactly()
            self._take_part(self.learner(*order.builder, **order.options), order)

    def _take_part(self, learner: Learner, order: Order, callbacks: Any = ()) -> RunRecord:
        try:
            if self.rank == 0:
                self.send(order)
            self.share(learner)
            # It comes from the first process of the same command, as all else that these processes exchange.
            values = self.unpacked(order.state, learner)
            return learn(learner, order.builder[1], *order.arguments, callbacks=callbacks, **values)
        except Exception as error:
            meaning = self.failed(error)
            if meaning is error:
                raise
            raise meaning from error


def run_in_processes(
    meet: Callable[[list[str]], Processes], is_first: bool, arguments: list[str] | None = None
) -> tuple[int, bool]:
    """Run the command in the first process, and follow it in the others.

    Args:
        meet: waits for all processes, given the words of the command; it may raise a BecameError, in all of them, if
            they are not alike.
        is_first: whether this is the first one, as far as it is known before they meet.
        arguments: the words of the command; those of this process if None.

    Returns:
        the exit status, and whether all processes end now. If not, the others may never end, and nothing should wait
        for them.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not is_first:
        _leave_to_the_first()
    try:
        processes = meet(words)
    except (BecameError, RuntimeError, ValueError) as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr)
        return 2, False
    if processes.rank == 0:
        return _lead(processes, words)
    _leave_to_the_first()
    status = _follow(processes)
    return status, status == 0


def _leave_to_the_first() -> None:
    """Ignore signals and warnings, which the first process has as well."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def _lead(processes: Processes, words: list[str]) -> tuple[int, bool]:
    from adapters.cli.main import main

    all_end = False
    try:
        status = main(replace(processes.backend, learner=processes.learner, learn=processes.learn), words)
    finally:
        processes.tell_why()
        if not processes.busy:
            with suppress(BecameError):
                processes.send(None)
                all_end = True
    return status, all_end


def _follow(processes: Processes) -> int:
    own = f"process {processes.rank + 1} of {processes.count}"
    try:
        processes.follow()
    except LostProcessError as error:
        # If the first process lives, it says why. It may be waiting for this one, and cannot before this one has ended.
        if not processes.is_first_alive() and not processes.is_told():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except BecameError as error:
        if not processes.is_told():  # the first process mostly has the same error, and says so
            print(f"error: {own}: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        print(f"error: {own} failed: {first_line(error)}.", file=sys.stderr, flush=True)
        return 1
    return 0
