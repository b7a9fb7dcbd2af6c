"""The scalars of a run for experiment trackers, whatever package writes them.

Convention: the step of every scalar is the number of the run's epochs so far; accuracies are in percent. The scalars of
an epoch or a task are written when the state after it has been saved by an earlier callback. So a run that is
interrupted and resumed has no point twice.
"""

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

from became_core import BecameError
from became_core.continual import Callback, EpochEnd, RunState, TaskEnd
from became_core.continual.metrics import Measure, average_accuracy, backward_transfer
from became_core.registry import nearest

__all__ = ["TRACKERS", "Tracker", "Writer", "open_writer"]

# The package that each tracker needs; the module of the tracker's name in this folder has its ``open_writer``.
TRACKERS = {"tensorboard": "tensorboardX", "trackio": "trackio"}


class Writer(Protocol):
    """Writes scalars."""

    def begin(self, hyperparameters: Mapping[str, str | int | float | bool], step: int) -> None:
        """Begin; or, if the step is not 0, continue after it: scalars of later steps no longer count."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars by name at one step; a process that is killed may lose the last ones."""

    def end(self) -> None:
        """Finish writing."""


def open_writer(tracker: str, folder: Path) -> Writer:
    """Return the writer of a tracker for a run; nothing is written yet.

    Args:
        tracker: its name, a key of ``TRACKERS``.
        folder: the run's folder, ``OUT/RUN``.

    Raises:
        BecameError: if there is no such tracker, or its package is missing.
    """
    if tracker not in TRACKERS:
        raise BecameError(f"there is no tracker '{tracker}'{nearest(tracker, TRACKERS)}.")
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
    """A callback that gives the scalars of a run to a writer; use it as a context."""

    def __init__(self, writer: Writer, configuration: Mapping[str, Any]) -> None:
        """Store the writer and the run's configuration.

        Args:
            writer: writes the scalars.
            configuration: plain values by name; a list becomes one text, and None is left out.
        """
        self._writer = writer
        self._hyperparameters = {
            name: " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            for name, value in configuration.items()
            if value is not None
        }
        self._scalars: dict[str, float] = {}
        self._started = False

    def __enter__(self) -> Self:
        """Do nothing yet: the step to begin with is known when the run begins."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Finish, whether or not the run failed."""
        if self._started:
            self._writer.end()

    def on_run_begin(self, state: RunState) -> None:
        """Begin at the step of the state."""
        self._started = True
        self._writer.begin(self._hyperparameters, state.epochs)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Keep the loss and the rate until the state is saved."""
        self._scalars = {"epoch/loss": event.loss, "epoch/rate": event.rate}
        if math.isfinite(event.validation_loss):
            self._scalars["epoch/validation_loss"] = event.validation_loss

    def on_task_end(self, event: TaskEnd) -> None:
        """Keep alpha and the accuracy of each task until the state is saved."""
        self._scalars = {} if event.alpha is None else {"task/alpha": event.alpha}
        for what, values in (
            ("accuracy", event.accuracy),
            ("loss", event.loss),
            ("correlation", event.correlation),
        ):
            finite = {task: value for task, value in enumerate(values, start=1) if math.isfinite(value)}
            self._scalars |= {f"{what}/task_{task:02d}": value for task, value in finite.items()}

    def on_state(self, state: RunState) -> None:
        """Write the scalars of the epoch or the task and, after a task, the metrics of all tasks so far."""
        if state.stage is None:
            so_far = state.record.measured[: state.task, : state.task]
            by_argmax = state.record.class_incremental_accuracy[: state.task, : state.task]
            self._scalars["task/ACC"] = average_accuracy(so_far)
            self._scalars["task/BWT"] = backward_transfer(so_far)
            if Measure(state.record.unit).is_accuracy:
                self._scalars["task/class_incremental_ACC"] = average_accuracy(by_argmax)
        self._writer.log(self._scalars, state.epochs)
        self._scalars = {}
