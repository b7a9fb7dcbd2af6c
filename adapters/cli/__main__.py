"""``python -m adapters.cli {compare,report} OUT…``: what is made of finished runs, whatever the framework."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro

    from adapters.cli.compare import comparison, gather
    from adapters.cli.rendering import FORMATS
    from adapters.cli.reporting import report
except ModuleNotFoundError as error:
    print(f"error: the package '{error.name}' is missing; pip install 'became[run]'.", file=sys.stderr)
    sys.exit(2)

from became_core import BecameError

__all__ = ["Compare", "Report", "main"]

Outs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT…")]


@dataclass(frozen=True)
class Compare:
    """Compare finished runs: methods by metrics over seeds, beside the published numbers of the same benchmark."""

    outs: Outs
    """Folders that --out named."""
    baseline: str | None = None
    """The row that the others are held against, seed by seed."""
    format: Literal["text", "markdown", "csv", "latex"] = "text"
    """How the tables are written."""

    def run(self) -> None:
        """Print the tables."""
        if not self.outs:
            raise BecameError("there is nothing to compare; give a folder that --out named.")
        print(FORMATS[self.format](comparison(gather(self.outs), self.baseline)), end="")


@dataclass(frozen=True)
class Report:
    """Write report.html, which needs no network, of finished runs, and their figures as PNG and SVG files beside it."""

    outs: Outs
    """Folders that --out named."""
    into: Path | None = None
    """Where the report goes; into the first of these folders if not given."""

    def run(self) -> None:
        """Write the page, and print where it is."""
        print(report(self.outs, self.into))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after a sentence on what was wrong."""
    commands: Any = (
        Annotated[Compare, tyro.conf.subcommand("compare")] | Annotated[Report, tyro.conf.subcommand("report")]
    )
    given = tyro.cli(commands, prog="python -m adapters.cli", args=arguments)
    try:
        given.run()
    except BecameError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
