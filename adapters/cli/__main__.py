"""``became``, which ``python -m adapters.cli`` is too: runs on any framework, and what is made of finished ones.

No framework is loaded before a run needs it.
"""

import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from became_core import BecameError, __version__
from became_core.registry import nearest

try:
    import tyro

    from adapters.backend.entry import BACKENDS, BackendName, first_installed, load_backend
    from adapters.cli.checkpoints import Fisher, Inspect, Merge
    from adapters.cli.display import Display
    from adapters.cli.jobs import unfinished_jobs
    from adapters.cli.listing import Kind, listed
    from adapters.cli.main import execute, run_request, while_it_is_read
    from adapters.cli.options import (
        Output,
        Request,
        Scheduler,
        Workers,
        described,
        is_completing,
        one_of,
        parse,
        request_of,
        request_type,
        with_short_help,
    )
    from adapters.cli.pool import engine_of
    from adapters.cli.running import UnfinishedError, run_jobs
except ModuleNotFoundError as error:
    if sys.argv[1:] == ["--version"]:
        print(f"became {__version__}")
        sys.exit(0)
    if sys.argv[1:] == ["doctor"]:  # which says what is missing
        from adapters.cli.doctor import diagnosis

        print(diagnosis())
        sys.exit(0)
    extras = "'became[torch]', or with jax or tensorflow in its place; a merge of files needs 'became[merge]' alone"
    print(f"error: the package '{error.name}' is missing; pip install {extras}.", file=sys.stderr)
    sys.exit(2)

from adapters.runs import read_results
from adapters.runs.directory import read_record

__all__ = ["main"]

Outs = Annotated[
    tuple[Path, ...], tyro.conf.Positional, described("Folders that --out named, with runs.", metavar="OUT…")
]

DESCRIPTION = """Bayesian continual learning with adaptive model merging.

The options of a command: became COMMAND --help

The version: became --version

Completion in a shell: became --tyro-write-completion {bash,zsh,fish} FILE
"""


@dataclass(frozen=True)
class Resume:
    """Resume every unfinished run in a folder, with the options it started with."""

    out: Annotated[Path, tyro.conf.Positional, described("A folder that --out named, with runs.", metavar="OUT")]
    backend: Annotated[
        BackendName | None,
        one_of(*BACKENDS),
        described("The framework; without it the one that worked on a run last."),
    ] = None
    data_dir: Annotated[Path | None, described("Where the data is, if it is no longer where it was.")] = None
    device: Annotated[str | None, described("Where to compute, if not where it was.")] = None
    workers: Workers = None
    scheduler: Scheduler = None
    output: Output = field(default_factory=Output)

    def run(self) -> int:
        """Resume the runs, and show all results of the folder."""

        def command(display: Display) -> None:
            options: Any = {"backend": self.backend, "data_dir": self.data_dir, "device": self.device}
            engine, share = engine_of(self.workers, self.scheduler)
            jobs = [replace(job, share=share) for job in unfinished_jobs(self.out, load_backend, **options)]
            try:
                run_jobs(jobs, display, engine)
            except UnfinishedError:
                display.results(read_results(self.out), self.out)
                raise
            display.results(read_results(self.out), self.out)

        return execute(command, self.output)


@dataclass(frozen=True)
class Compare:
    """Compare finished runs over seeds, beside the published numbers."""

    outs: Outs
    baseline: Annotated[str | None, described("The row that the others are compared with, seed by seed.")] = None
    format: Annotated[
        Literal["text", "markdown", "csv", "latex"],
        one_of("text", "markdown", "csv", "latex"),
        described("How the tables are written. (default: text)"),
    ] = "text"

    def run(self) -> int:
        """Print the tables."""
        from adapters.analysis.comparison import comparison, gather
        from adapters.analysis.tables import FORMATS

        def tables() -> str:
            if not self.outs:
                raise BecameError("there is nothing to compare; give a folder that --out named.")
            return FORMATS[self.format](comparison(gather(self.outs), self.baseline))

        return execute(lambda display: print(tables(), end=""), Output())


@dataclass(frozen=True)
class Report:
    """Write report.html of finished runs, and its figures as PNG and SVG beside it."""

    outs: Outs
    into: Annotated[Path | None, described("The folder of the report; without it the first of the given folders.")] = (
        None
    )

    def run(self) -> int:
        """Write the page, and print where it is."""

        def written() -> Path:
            from adapters.analysis.report import report  # needs matplotlib, which is an extra

            return report(self.outs, self.into)

        return execute(lambda display: print(written()), Output())


@dataclass(frozen=True)
class Figures:
    """Draw accuracy by epochs, and plasticity against forgetting, as SVG."""

    outs: Outs
    into: Annotated[Path | None, described("The folder of the figures; without it the first of the given folders.")] = (
        None
    )
    only: Annotated[
        Literal["epochs", "plasticity"] | None,
        one_of("epochs", "plasticity"),
        described("Draw this one alone; without it plasticity, and epochs if a method ran for two numbers of epochs."),
    ] = None

    def run(self) -> int:
        """Write the figures, and print where they are."""

        def written() -> list[Path]:
            from adapters.analysis.report import write_figures  # needs matplotlib, which is an extra

            return write_figures(self.outs, self.into, self.only)

        return execute(lambda display: print(*written(), sep="\n"), Output())


@dataclass(frozen=True)
class Paths:
    """Compare the alpha of every estimator with the traced truth: tables, and a figure of each run as SVG."""

    outs: Outs
    into: Annotated[Path | None, described("The folder of the figures; without it, the given folder of the run.")] = (
        None
    )

    def run(self) -> int:
        """Print the tables of all traced runs, and where the figures are."""
        from adapters.analysis.path_report import write_paths
        from adapters.analysis.tables import FORMATS

        def shown() -> str:
            if not self.outs:
                raise BecameError("there are no paths to show; give a folder that --out named.")
            tables, files = write_paths(self.outs, self.into)
            return FORMATS["text"](tables) + "\n".join(["", *map(str, files)])

        return execute(lambda display: print(shown()), Output())


@dataclass(frozen=True)
class Reproduce:
    """Compute all runs of a table that people look for, or go on with them, and compare them. Without a name: list."""

    name: Annotated[
        str | None, tyro.conf.Positional, described("Which table. (default: list them all)", metavar="NAME")
    ] = None
    out: Annotated[Path, described("The folder that the runs' folders are made in. (default: runs/reproduce)")] = Path(
        "runs", "reproduce"
    )
    seeds: Annotated[tuple[int, ...], described("Other seeds than the table's own.", metavar="INT…")] = ()
    first: Annotated[int | None, described("Learn only this many tasks of each stream, the first ones.")] = None
    backend: Annotated[
        BackendName | None, one_of(*BACKENDS), described("The framework; without it the first that is installed.")
    ] = None
    data_dir: Annotated[Path | None, described("Where the data is.")] = None
    device: Annotated[str | None, described("Where to compute.")] = None
    workers: Workers = None
    scheduler: Scheduler = None
    dry_run: Annotated[bool, described("Print the commands that make the table, and run nothing.")] = False

    def run(self) -> int:
        """Run the table's commands one after the other, and print the comparison."""
        from adapters.cli.reproduce import Reproduction, reproductions

        if self.name is None:
            print(reproductions())
            return 0
        try:
            table = Reproduction.named(self.name)
        except BecameError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        options = {"first": self.first, "backend": self.backend, "data-dir": self.data_dir, "device": self.device}
        options |= {"workers": self.workers, "scheduler": self.scheduler}
        others = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
        commands = table.commands(self.out, *others, seeds=self.seeds)
        print(f"{self.name}: {table.title}\n")
        for words in commands:
            print(f"became {shlex.join(words)}", flush=True)
            status = 0 if self.dry_run else main(words)
            if status:
                return status
        return execute(lambda display: None if self.dry_run else print(table.compared(self.out), end=""), Output())


@dataclass(frozen=True)
class List:
    """List what there is to choose from."""

    kind: Annotated[
        Literal["all", Kind],
        tyro.conf.Positional,
        one_of("all", *get_args(Kind)),
        described("What to list: all, or benchmarks, methods, projectors, networks or presets. (default: all)"),
    ] = "all"

    def run(self) -> int:
        """Print the lines."""
        # On a terminal a long line goes on below its text; for another program it stays a line.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
        print(listed(None if self.kind == "all" else self.kind, width))
        return 0


@dataclass(frozen=True)
class Doctor:
    """Say what is installed, on which devices it can run, which data are found, and what is missing."""

    def run(self) -> int:
        """Print the lines."""
        from adapters.cli.doctor import diagnosis  # it imports every framework that is installed

        print(diagnosis())
        return 0


# The commands beside ``run``, whose options depend on what is registered.
COMMANDS: dict[str, Any] = {
    "resume": Resume,
    "compare": Compare,
    "report": Report,
    "figures": Figures,
    "paths": Paths,
    "reproduce": Reproduce,
    "list": List,
    "inspect": Inspect,
    "fisher": Fisher,
    "merge": Merge,
    "doctor": Doctor,
}


@while_it_is_read
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status, as ``execute`` does."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words == ["--version"]:
        print(f"became {__version__}")
        return 0
    name = next(iter(words), "")
    try:
        run = {} if name in COMMANDS else {"run": request_type(backend=True, completing=is_completing(words))}
    except BecameError as error:  # of what another package registers
        print(f"error: {error}", file=sys.stderr)
        return 2
    commands = run | COMMANDS
    if name and name not in commands and not name.startswith("-"):
        print(f"error: there is no command '{name}'{nearest(name, commands)}.", file=sys.stderr)
        return 2
    if name not in commands:  # a question for help or completion, or nothing at all: tyro answers and ends the program
        parse(_one_of_commands(commands), "became", words, DESCRIPTION)
    kind, rest = commands[name], words[1:]
    command = parse(kind, f"became {name}", with_short_help(kind, "became run", rest) if name == "run" else rest)
    if name == "run":
        return _run(request_of(command))
    status: int = command.run()
    return status


def _one_of_commands(commands: dict[str, Any]) -> Any:
    """Return the type that is one of these commands, as tyro knows it."""
    kinds: Iterable[Any] = (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items())
    return reduce(or_, kinds)


def _run(request: Request) -> int:
    """Run on the backend that is asked for, or on the recorded one, or on the first that is installed."""
    remarks: list[str] = []
    name: str | None = request.backend
    try:
        if name is None and request.config is not None:
            name = read_record(request.config).backend
            remarks = [f"backend: {name}, as in {request.config}"]
        if name is None:
            name = first_installed()
            remarks = [f"backend: {name}, the first that is installed"]
        if name not in get_args(BackendName):
            raise BecameError(f"{request.config} is of a run on {name}; say with --backend what to run on.")
    except BecameError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_request(partial(load_backend, cast(BackendName, name)), request, *remarks)


if __name__ == "__main__":
    sys.exit(main())
