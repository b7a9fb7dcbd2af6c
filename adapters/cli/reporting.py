"""A page of finished runs: what reads their folders and writes it."""

from collections.abc import Sequence
from pathlib import Path

from adapters.runs.published import published_tables
from became_core import BecameError

__all__ = ["report"]


def report(
    outs: Sequence[Path],
    into: Path | None = None,
) -> Path:
    """Write the report of these folders' runs and return its file.

    Args:
        outs: folders of finished runs.
        into: where it goes; into the first of them if not given.

    Raises:
        BecameError: if there is nothing to report, a file is damaged or cannot be written, or matplotlib is missing.
    """
    # Only here: matplotlib is an extra, and what imports this module may do without.
    from adapters.analysis.checking import read_runs
    from adapters.analysis.writing import write_report

    if not outs:
        raise BecameError("there is nothing to report on; give a folder that --out named.")
    results = read_runs(outs)
    return write_report(results, into or outs[0], published_tables(results[0].benchmark, len(results[0].accuracy)))
