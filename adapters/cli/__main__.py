"""``python -m adapters.cli compare OUT…``: what needs no framework: tables of runs that are finished."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

try:
    import tyro

    from adapters.cli.compare import comparison, gather
    from adapters.cli.rendering import FORMATS
except ModuleNotFoundError as error:
    print(f"error: the package '{error.name}' is missing; pip install 'became[run]'.", file=sys.stderr)
    sys.exit(2)

from became_core import BecameError

__all__ = ["Arguments", "main"]


@dataclass(frozen=True)
class Arguments:
    """Compare finished runs: methods by metrics over seeds, beside the published numbers of the same benchmark."""

    command: tyro.conf.Positional[Literal["compare"]]
    """What to do."""
    outs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT…")]
    """Folders that --out named."""
    baseline: str | None = None
    """The row that the others are held against, seed by seed."""
    format: Literal["text", "markdown", "csv", "latex"] = "text"
    """How the tables are written."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after a sentence on what was wrong."""
    given = tyro.cli(Arguments, prog="python -m adapters.cli compare", args=arguments)
    try:
        if not given.outs:
            raise BecameError("there is nothing to compare; give a folder that --out named.")
        print(FORMATS[given.format](comparison(gather(given.outs), given.baseline)), end="")
    except BecameError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
