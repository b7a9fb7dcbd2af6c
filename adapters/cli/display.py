"""What a command shows on standard output: text for people, or lines of JSON for programs.

Convention: a line of JSON is an object with ``event``; those of a run have ``run``, its name, and are its events as its
``events.jsonl`` has them, and then ``result``, what its ``results.json`` has. Nothing else is on standard output then.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from adapters.cli.dryrun import Plan
from adapters.cli.logs import LOGGER
from adapters.cli.output import Output
from adapters.cli.paths import estimator_table, path_table
from adapters.cli.progress import RunProgress
from adapters.cli.table import comparison_table
from adapters.runs import RunDirectory, RunResult
from adapters.runs.events import Events, json_line, now
from became_core.continual import Callback

__all__ = ["Display", "display_of"]


class Display(Protocol):
    """Shows how runs go, and what came out."""

    def note(self, text: str) -> None:
        """Show a remark."""

    def watching(self, run: RunDirectory, backend: str, tasks: int, stages: int) -> Any:
        """Return a context whose value is a callback that shows a run; arguments as of ``RunProgress``."""

    def result(self, run: RunDirectory, result: RunResult, *, before: bool) -> None:
        """Show that a run is finished, or has been before."""

    def results(self, results: Sequence[RunResult], out: Path) -> None:
        """Show what came out of all runs, and where it is."""

    def plan(self, plan: Plan) -> None:
        """Show what would be done."""


class _Text:
    def __init__(self, *, quiet: bool) -> None:
        self._console = Console() if sys.stdout.isatty() else Console(width=160)
        self._quiet = quiet

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    @contextmanager
    def watching(self, run: RunDirectory, backend: str, tasks: int, stages: int) -> Iterator[Callback]:
        if self._quiet:
            yield Callback()
        else:
            with RunProgress(self._console, run.name, tasks, stages) as progress:
                yield progress

    def result(self, run: RunDirectory, result: RunResult, *, before: bool) -> None:
        if before:
            self.note(f"{run.name}  finished before: {run.results_file}")

    def results(self, results: Sequence[RunResult], out: Path) -> None:
        for result in results:
            if result.paths:
                self._console.print(path_table(result))
                self._console.print(estimator_table(result))
        self._console.print(comparison_table(results))
        where = f"results: {out}/<method>-seed<k>/results.json, {out}/summary.csv"
        self._console.print(where, soft_wrap=True, highlight=False)

    def plan(self, plan: Plan) -> None:
        plan.show(self._console)


@dataclass(frozen=True)
class _Lines(Events):
    """The events of a run on standard output."""

    run: str
    backend: str

    def add(self, name: str, **values: Any) -> None:
        _print_line(name, run=self.run, **values)


class _Json:
    def note(self, text: str) -> None:
        LOGGER.info("%s", text)

    @contextmanager
    def watching(self, run: RunDirectory, backend: str, tasks: int, stages: int) -> Iterator[Callback]:
        yield _Lines(run.name, backend)

    def result(self, run: RunDirectory, result: RunResult, *, before: bool) -> None:
        _print_line("result", run=run.name, file=str(run.results_file), before=before, **result.to_json())

    def results(self, results: Sequence[RunResult], out: Path) -> None:
        pass  # each has been a line

    def plan(self, plan: Plan) -> None:
        _print_line("plan", **plan.to_json())


def display_of(output: Output) -> Display:
    """Return the display that is asked for."""
    return _Json() if output.log == "json" else _Text(quiet=output.quiet)


def _print_line(event: str, **values: Any) -> None:
    print(json_line({"event": event, "time": now(), **values}), flush=True)
