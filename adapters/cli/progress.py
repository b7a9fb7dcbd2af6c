"""What a run shows while it goes: a live bar on a terminal, a plain line an epoch elsewhere."""

import math
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adapters.runs.events import place
from became_core.continual import Callback, EpochEnd, RunState, TaskEnd

__all__ = ["RunProgress"]


class RunProgress(Callback):
    """Shows one run's events, as a callback of it; use as a context."""

    def __init__(self, console: Console, title: str, tasks: int, stages: int) -> None:
        """Prepare the display.

        Args:
            console: where it shows.
            title: the run's name.
            tasks: how many there are.
            stages: how many a task has, at most.
        """
        self._console = console
        self._title = title
        self._tasks = tasks
        self._stages = stages
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._row = self._bar.add_task(title, total=float(tasks), state="")

    def __enter__(self) -> Self:
        """Start the display."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the display."""
        self._bar.stop()

    @property
    def completed(self) -> float:
        """How many tasks are done, the present one by the share of its epochs."""
        return float(self._bar.tasks[0].completed)

    def on_run_begin(self, state: RunState) -> None:
        """Say where a run goes on that was interrupted."""
        if state.task or state.stage is not None:
            self._bar.update(self._row, completed=state.task)
            self._print(f"goes on after {place(state)}")

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Move the bar, or print a line."""
        state = (
            f"task {event.task + 1}/{self._tasks}  stage {event.stage}  epoch {event.epoch}/{event.epochs}  "
            f"loss {event.loss:.4f}  lr {event.rate:.2g}"
        )
        if not math.isnan(event.validation_loss):
            state += f"  validation loss {event.validation_loss:.4f}"
        done = (event.stage - 1 + event.epoch / event.epochs) / self._stages
        self._bar.update(self._row, completed=event.task + done, state=state)
        if not self._console.is_terminal:
            self._print(state)

    def on_task_end(self, event: TaskEnd) -> None:
        """Print a line."""
        alpha = "" if event.alpha is None else f"  alpha {event.alpha:.3f}"
        scores = " ".join(f"{accuracy:.1f}" for accuracy in event.accuracy)
        self._bar.update(self._row, completed=event.task + 1)
        self._print(f"task {event.task + 1}/{self._tasks} learned{alpha}  accuracy {scores}")
        for name in sorted(event.full):
            self._print(f"the protected space of {name} is full: no update is left for it in stage 1")

    def _print(self, text: str) -> None:
        self._console.print(f"{self._title}  {text}", highlight=False, soft_wrap=True, markup=False)
