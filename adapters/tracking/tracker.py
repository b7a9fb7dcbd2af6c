"""What is tracked of a run, whoever writes it down.

Convention: the step of every scalar is the number of the run's epochs so far; accuracies are in percent. What an epoch
or a task gave is written once the state after it is given away, that is, saved by a callback before this one: so a run
that is interrupted and gone on with has no point twice.
"""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

from became_core import BecameError
from became_core.continual import Callback, EpochEnd, RunState, TaskEnd
from became_core.continual.metrics import average_accuracy, backward_transfer

__all__ = ["TRACKERS", "Tracker", "Writer", "open_writer"]

# The packages that the trackers need; the module of that name here has its ``open_writer``.
TRACKERS = {"tensorboard": "tensorboardX", "trackio": "trackio"}


class Writer(Protocol):
    """What writes scalars down."""

    def begin(self, hyperparameters: Mapping[str, str | int | float | bool], step: int) -> None:
        """Begin, or, where the step is not 0, go on after it: what is there of later steps no longer counts."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars by name, at one step; a process that is killed may lose those of its last moments."""

    def end(self) -> None:
        """Finish what has begun."""


def open_writer(tracker: str, folder: Path) -> Writer:
    """Return the writer of a tracker, by name, for the run in a folder, ``OUT/RUN``; nothing is written yet.

    Raises:
        BecameError: if its package is missing.
    """
    try:
        module = import_module(f"adapters.tracking.{tracker}")
    except ModuleNotFoundError as error:
        if error.name != TRACKERS[tracker]:
            raise
        raise BecameError(
            f"the tracker {tracker} needs the package {TRACKERS[tracker]}; pip install 'became[{tracker}]'."
        ) from None
    return cast(Writer, module.open_writer(folder))


class Tracker(Callback):
    """Gives a run's scalars to a writer, as a callback of it; use as a context."""

    def __init__(self, writer: Writer, configuration: Mapping[str, Any]) -> None:
        """Hold the writer, and the run's configuration, nested plain values."""
        self._writer = writer
        self._hyperparameters = dict(_flat("", configuration))
        self._scalars: dict[str, float] = {}
        self._begun = False

    def __enter__(self) -> Self:
        """Nothing yet: where to begin is known when the run begins."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Finish, however the run ended."""
        if self._begun:
            self._writer.end()

    def on_run_begin(self, state: RunState) -> None:
        """Begin at the state's step."""
        self._begun = True
        self._writer.begin(self._hyperparameters, state.epochs)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Note loss and rate."""
        self._scalars = {"epoch/loss": event.loss, "epoch/rate": event.rate}
        if math.isfinite(event.validation_loss):
            self._scalars["epoch/validation_loss"] = event.validation_loss

    def on_task_end(self, event: TaskEnd) -> None:
        """Note alpha, and each task's accuracy."""
        self._scalars = {} if event.alpha is None else {"task/alpha": event.alpha}
        for task, accuracy in enumerate(event.accuracy, start=1):
            self._scalars[f"accuracy/task_{task:02d}"] = accuracy

    def on_state(self, state: RunState) -> None:
        """Write down what was noted, and, after a task, the metrics of all tasks so far."""
        if state.stage is None:
            so_far = state.record.accuracy[: state.task, : state.task]
            by_argmax = state.record.class_incremental_accuracy[: state.task, : state.task]
            self._scalars["task/ACC"] = average_accuracy(so_far)
            self._scalars["task/BWT"] = backward_transfer(so_far)
            self._scalars["task/class_incremental_ACC"] = average_accuracy(by_argmax)
        self._writer.log(self._scalars, state.epochs)
        self._scalars = {}


def _flat(name: str, value: Any) -> list[tuple[str, str | int | float | bool]]:
    """Nested values by dotted names; a list is one value, and what is not there is none."""
    if isinstance(value, Mapping):
        return [pair for key, each in value.items() for pair in _flat(f"{name}.{key}" if name else str(key), each)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = " ".join(map(str, value))
    return [] if value is None else [(name, value)]
