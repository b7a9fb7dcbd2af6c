"""``became``, which ``python -m adapters.cli`` is too: runs on any framework, and what is made of finished ones.

No framework is loaded before a run needs it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro

    from adapters.cli.backend import BackendName, first_installed, load_backend
    from adapters.cli.display import Display
    from adapters.cli.listing import Kind, listed
    from adapters.cli.main import execute, parse, run_options
    from adapters.cli.options import Options
    from adapters.cli.output import Output
    from adapters.cli.words import worded
except ModuleNotFoundError as error:
    print(f"error: the package '{error.name}' is missing; pip install 'became[run]'.", file=sys.stderr)
    sys.exit(2)

from became_core import BecameError

__all__ = ["main"]

Outs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT…", help_behavior_hint="")]


DESCRIPTION = """Bayesian continual learning with adaptive model merging.

A command's options: became COMMAND --help

The version: became --version

Completion in a shell: became --tyro-write-completion {bash,zsh,fish} FILE
"""


@dataclass(frozen=True)
@worded
class Run(Options):
    __doc__ = Options.__doc__

    backend: BackendName | None = None
    """The framework; the first of these that is installed if not given."""

    def run_jobs(self) -> int:
        """Run."""
        remarks, name = [], self.backend
        if name is None:
            try:
                name = first_installed()
            except BecameError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            remarks = [f"backend: {name}, the first that is installed"]
        return run_options(load_backend(name), self, *remarks)


@dataclass(frozen=True)
@worded
class Resume:
    """Go on with every unfinished run in a folder, with the options it began with."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """A folder that --out named."""
    backend: BackendName | None = None
    """The framework; that which was last at work on a run if not given."""
    data_dir: Path | None = None
    """Where the data is, if it is no longer where it was."""
    device: str | None = None
    """Where to compute, if not where it was."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)

    def run_jobs(self) -> int:
        """Go on."""
        from adapters.cli.resuming import unfinished
        from adapters.cli.running import run_jobs
        from adapters.runs import read_results

        def command(display: Display) -> None:
            jobs = unfinished(self.out, load_backend, backend=self.backend, data_dir=self.data_dir, device=self.device)
            run_jobs(jobs, display)
            display.results(read_results(self.out), self.out)

        return execute(command, self.output)


@dataclass(frozen=True)
@worded
class Compare:
    """Compare finished runs over seeds, beside the published numbers."""

    outs: Outs
    """Folders that --out named."""
    baseline: str | None = None
    """The row that the others are held against, seed by seed."""
    format: Literal["text", "markdown", "csv", "latex"] = "text"
    """How the tables are written."""

    def run_jobs(self) -> int:
        """Print the tables."""
        from adapters.cli.compare import comparison, gather
        from adapters.cli.rendering import FORMATS

        def tables() -> str:
            if not self.outs:
                raise BecameError("there is nothing to compare; give a folder that --out named.")
            return FORMATS[self.format](comparison(gather(self.outs), self.baseline))

        return execute(lambda display: print(tables(), end=""), Output())


@dataclass(frozen=True)
@worded
class Report:
    """Write report.html of finished runs, and its figures as PNG and SVG beside it."""

    outs: Outs
    """Folders that --out named."""
    into: Path | None = None
    """Where the report goes; into the first of these folders if not given."""

    def run_jobs(self) -> int:
        """Write the page, and print where it is."""
        from adapters.cli.reporting import report

        return execute(lambda display: print(report(self.outs, self.into)), Output())


@dataclass(frozen=True)
@worded
class List:
    """List what there is to choose from, a line each."""

    kind: Annotated[Literal["all", Kind], tyro.conf.Positional] = "all"
    """Of what: benchmarks, methods, projectors or presets."""

    def run_jobs(self) -> int:
        """Print the lines."""
        print(listed(None if self.kind == "all" else self.kind))
        return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status, as ``execute`` does."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        print(f"became {_version()}")
        return 0
    commands: Any = (
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Resume, tyro.conf.subcommand("resume")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[List, tyro.conf.subcommand("list")]
    )
    status: int = parse(commands, "became", given, DESCRIPTION).run_jobs()
    return status


def _version() -> str:
    try:
        return version("became")
    except PackageNotFoundError:  # run from a checkout
        return "of this checkout"


if __name__ == "__main__":
    sys.exit(main())
