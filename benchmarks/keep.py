"""Keep the results of finished runs beside the pages: ``python benchmarks/keep.py OUT… --into FOLDER``.

Checkpoints are large and stay where they are. What is kept is ``results.json`` of each run, without the folder of the
data, which is a path of one machine, and without the samples that a generative network drew. ``became compare FOLDER``
and ``became figures FOLDER`` read kept results as they read those of a run.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.runs import RunDirectory, finished_runs, read_results
from became_core import BecameError


def keep(outs: Sequence[Path], into: Path) -> list[Path]:
    """Write the result of each finished run to ``into/<method>-seed<k>/results.json``, and return these files.

    Raises:
        BecameError: before anything is written, if a folder has no finished run, or another result would be lost.
    """
    added = [replace(run, data_dir=None, samples=[]) for run in finished_runs(outs)]
    kept = {(run.method, run.seed): run for run in read_results(into)}
    for run in added:
        if kept.setdefault((run.method, run.seed), run).to_json() != run.to_json():
            raise BecameError(f"{into} has another run of {run.method} with seed {run.seed}; choose another --into.")
    directories = [RunDirectory(into, run.method, run.seed) for run in added]
    for directory, run in zip(directories, added, strict=True):
        directory.save(run)
    return [directory.results_file for directory in directories]


def main() -> None:
    """Keep the runs that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("outs", nargs="+", type=Path, metavar="OUT", help="folders that --out named")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="where the results are kept")
    options = parser.parse_args()
    for file in keep(options.outs, options.into):
        print(file)


if __name__ == "__main__":
    try:
        main()
    except BecameError as error:
        sys.exit(f"error: {error}")
