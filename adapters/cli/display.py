"""What a command shows: text for people or lines of JSON for programs on standard output, the log on standard error.

Convention: a line of JSON is an object with ``event``. Those of a run also have ``run``, the run's name. They are the
events that ``events.jsonl`` has, and at the end ``result``, which is what ``results.json`` has. A command such as a
merge writes one line with its result, and one with the traced path, if that was asked for. Then nothing else is on
standard output. On a terminal a run shows a live bar, elsewhere a plain line for each epoch.
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adapters.analysis.path_report import estimator_table, path_table
from adapters.analysis.tables import print_table
from adapters.cli.dryrun import Plan
from adapters.cli.options import Level, Output
from adapters.cli.results import results_tables
from adapters.runs import RunDirectory, RunResult
from adapters.runs.events import Events, json_line, now
from became_core.continual import EpochEnd, TaskEnd

__all__ = ["LOGGER", "Display", "RunProgress", "display_of", "logged"]

LOGGER = logging.getLogger("became")


class Display(Protocol):
    """Shows how runs proceed, and their results."""

    def note(self, text: str) -> None:
        """Show a remark."""

    def outcome(self, event: str, lines: Iterable[str], /, **values: Any) -> None:
        """Show what came of a command that is no run: lines for people, values for programs."""

    def several(self, count: int) -> AbstractContextManager[None]:
        """Return a context in which so many runs are shown, and some of them at the same time."""

    def watching(self, run: RunDirectory, backend: str, tasks: int, stages: int) -> AbstractContextManager[Events]:
        """Return a context whose value shows a run's events; arguments as of ``RunProgress``."""

    def failed(self, run: RunDirectory, message: str) -> None:
        """Show why a run failed, while others go on."""

    def result(self, run: RunDirectory, result: RunResult, *, before: bool) -> None:
        """Show that a run is finished, or was finished before."""

    def results(self, results: Sequence[RunResult], out: Path) -> None:
        """Show the results of all runs, and where they are."""

    def plan(self, plan: Plan) -> None:
        """Show what a dry run says would be done."""

    def configuration(self, values: dict[str, Any]) -> None:
        """Show the value of every option."""


class _Text:
    def __init__(self, *, quiet: bool) -> None:
        self._console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=160)
        self._quiet = quiet
        self._several: Progress | None = None

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def outcome(self, event: str, lines: Iterable[str], /, **values: Any) -> None:
        for line in lines:
            print(line)

    @contextmanager
    def several(self, count: int) -> Iterator[None]:
        if self._quiet:
            yield
            return
        with _bars(self._console) as self._several:
            self._several.add_task("all runs", total=float(count), state=f"0/{count} finished")
            yield
        self._several = None

    @contextmanager
    def watching(self, run: RunDirectory, backend: str, tasks: int, stages: int) -> Iterator[Events]:
        if self._quiet:
            yield _Silent()
        else:
            with RunProgress(self._console, run.name, tasks, stages, self._several) as progress:
                yield progress

    def failed(self, run: RunDirectory, message: str) -> None:
        LOGGER.error("%s: %s", run.name, message)

    def result(self, run: RunDirectory, result: RunResult, *, before: bool) -> None:
        if self._several is not None:
            total = self._several.tasks[0]
            state = f"{total.completed + 1:.0f}/{total.total:.0f} finished"
            self._several.update(total.id, advance=1.0, state=state)
        if before:
            self.note(f"{run.name}  finished before: {run.results_file}")

    def results(self, results: Sequence[RunResult], out: Path) -> None:
        traced = [table(result) for result in results if result.paths for table in (path_table, estimator_table)]
        for table in [*traced, *results_tables(results)]:
            print_table(self._console, table)
            self._console.print()
        where = f"results: {out}/<method>-seed<k>/results.json, {out}/summary.csv"
        self._console.print(where, soft_wrap=True, highlight=False, markup=False)

    def plan(self, plan: Plan) -> None:
        plan.show(self._console, quiet=self._quiet)

    def configuration(self, values: dict[str, Any]) -> None:
        self._console.print_json(data=values)


@dataclass(frozen=True)
class _Lines(Events):
    """The events of a run on standard output."""

    run: str
    backend: str

    def add(self, name: str, **values: Any) -> None:
        _print_line(name, run=self.run, **values)


class _Silent(Events):
    def add(self, name: str, **values: Any) -> None:
        pass


class _Json:
    def note(self, text: str) -> None:
        LOGGER.info("%s", text)

    def outcome(self, event: str, lines: Iterable[str], /, **values: Any) -> None:
        _print_line(event, **values)

    @contextmanager
    def several(self, count: int) -> Iterator[None]:
        yield

    @contextmanager
    def watching(self, run: RunDirectory, backend: str, tasks: int, stages: int) -> Iterator[Events]:
        yield _Lines(run.name, backend)

    def failed(self, run: RunDirectory, message: str) -> None:
        LOGGER.error("%s: %s", run.name, message)
        _print_line("failed", run=run.name, message=message)

    def result(self, run: RunDirectory, result: RunResult, *, before: bool) -> None:
        _print_line("result", run=run.name, file=str(run.results_file), before=before, **result.to_json())

    def results(self, results: Sequence[RunResult], out: Path) -> None:
        pass  # each result has been a line

    def plan(self, plan: Plan) -> None:
        _print_line("plan", **plan.to_json())

    def configuration(self, values: dict[str, Any]) -> None:
        _print_line("configuration", configuration=values)


def display_of(output: Output) -> Display:
    """Return the display that these options ask for."""
    return _Json() if output.log == "json" else _Text(quiet=output.quiet)


def _print_line(event: str, **values: Any) -> None:
    print(json_line({"event": event, "time": now(), **values}), flush=True)


def _bars(console: Console) -> Progress:
    """Return a display of bars, one for each run that is shown."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[state]}"),
        TextColumn("took"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class RunProgress(Events):
    """Shows one run's events, as a callback of it or as they are added; use as a context."""

    def __init__(self, console: Console, title: str, tasks: int, stages: int, several: Progress | None = None) -> None:
        """Prepare the display.

        Args:
            console: where it is shown.
            title: the run's name.
            tasks: the number of tasks.
            stages: the largest number of stages of a task.
            several: the bars of all runs that are shown at the same time, which are shown already; None if this run is
                alone.
        """
        self._console = console
        self._title = title
        self._tasks = tasks
        self._stages = stages
        self._alone = several is None
        self._bar = _bars(console) if several is None else several
        self._row = self._bar.add_task(title, total=float(tasks), state="")

    def __enter__(self) -> Self:
        """Start the display."""
        if self._alone:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the display; a bar among several goes, and its last lines stay."""
        if self._alone:
            self._bar.stop()
        else:
            self._bar.remove_task(self._row)

    @property
    def completed(self) -> float:
        """How many tasks are done; the present one counts by the share of its epochs that are done."""
        return float(next(row.completed for row in self._bar.tasks if row.id == self._row))

    def add(self, name: str, **values: Any) -> None:
        """Move the bar, and print a line where a run goes on, a task ends or there is no bar."""
        if name == "resume":
            self._bar.update(self._row, completed=values["tasks_done"])
            self._print(f"goes on after {values['after']}")
        elif name == "epoch":
            self._show_epoch(EpochEnd(**values))
        elif name == "task":
            self._show_task(TaskEnd(**values))

    def _show_epoch(self, event: EpochEnd) -> None:
        where = f"task {event.task + 1}/{self._tasks}  stage {event.stage}  epoch {event.epoch}/{event.epochs}"
        loss = f"  loss {event.loss:.4f}  lr {event.rate:.2g}"
        if not math.isnan(event.validation_loss):
            loss += f"  validation loss {event.validation_loss:.4f}"
        done = (event.stage - 1 + event.epoch / event.epochs) / self._stages
        # In a narrow terminal the bar would cut the line short.
        state = where + loss if self._console.width >= 120 else where.replace("  ", " ")
        self._bar.update(self._row, completed=event.task + done, state=state)
        if not self._console.is_terminal:
            self._print(where + loss)

    def _show_task(self, event: TaskEnd) -> None:
        alpha = "" if event.alpha is None else f"  alpha {event.alpha:.3f}"
        if event.temperature is not None:
            alpha += f"  curvature x {event.temperature:.3f}"
        measured = [math.isfinite(accuracy) for accuracy in event.accuracy]
        what, values = ("accuracy", event.accuracy) if all(measured) else ("loss", event.loss)
        scores = " ".join(f"{value:.{1 if what == 'accuracy' else 3}f}" for value in values)
        if event.correlation:
            scores += "  correlation " + " ".join(f"{value:.3f}" for value in event.correlation)
        self._bar.update(self._row, completed=event.task + 1)
        self._print(f"task {event.task + 1}/{self._tasks} learned{alpha}  {what} {scores}")
        for name in sorted(event.full):
            self._print(f"the protected space of {name} is full: no update is left for it in stage 1")

    def _print(self, text: str) -> None:
        self._console.print(f"{self._title}  {text}", highlight=False, soft_wrap=True, markup=False)


class _StandardError(logging.Handler):
    """Writes to what standard error is at the time: a progress bar, and a test, may replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def logged(level: Level, handler: logging.Handler | None = None) -> Iterator[None]:
    """Show messages of a level and of more serious ones, Python's warnings among them, each of these once.

    Args:
        level: the least serious level that is shown.
        handler: what shows them; None for standard error.
    """
    handler, usual = handler or _StandardError(), LOGGER.level
    shown: set[str] = set()

    def warn(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: object = None,  # noqa: ARG001 # what it stands in for fixes the signature
        line: object = None,  # noqa: ARG001
    ) -> None:
        if str(message) in shown:
            return
        shown.add(str(message))
        LOGGER.warning("%s", message)
        LOGGER.debug("that is a %s, from %s:%d", category.__name__, filename, lineno)

    LOGGER.addHandler(handler)
    LOGGER.setLevel(level.upper())
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(usual)
