"""``python -m adapters.cli.report_command OUT…``: a page of finished runs, with their figures.

Convention: 0 is success, 2 a sentence on what was wrong.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from became_core import BecameError

if TYPE_CHECKING:
    from adapters.report.accuracy import Published

__all__ = ["Arguments", "main", "report"]


@dataclass(frozen=True)
class Arguments:
    """Write report.html, which needs no network, of finished runs, and their figures as PNG and SVG files beside it."""

    outs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT…")]
    """Folders that --out named."""
    into: Path | None = None
    """Where the report goes; into the first of these folders if not given."""


def report(
    outs: Sequence[Path],
    into: Path | None = None,
    published: "Callable[[str, int], Sequence[Published]]" = lambda benchmark, tasks: (),
) -> Path:
    """Write the report of these folders' runs and return its file.

    Args:
        outs: folders of finished runs.
        into: where it goes; into the first of them if not given.
        published: what has been published of a benchmark in so many tasks.

    Raises:
        BecameError: if there is nothing to report, a file is damaged or cannot be written, or matplotlib is missing.
    """
    # Only here: matplotlib is an extra, and what imports this module may do without.
    from adapters.report.checking import read_runs
    from adapters.report.writing import write_report

    if not outs:
        raise BecameError("there is nothing to report on; give a folder that --out named.")
    results = read_runs(outs)
    return write_report(results, into or outs[0], published(results[0].benchmark, len(results[0].accuracy)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    given = tyro.cli(Arguments, prog="python -m adapters.cli.report_command", args=arguments)
    try:
        print(report(given.outs, given.into))
    except BecameError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
