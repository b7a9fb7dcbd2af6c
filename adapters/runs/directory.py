"""The folder of a comparison: ``OUT/<method>-seed<k>/results.json`` and ``OUT/summary.csv``.

A file is written whole under another name and then renamed, so that what is there is never half a file.
"""

import csv
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.runs.results import RunResult
from became_core import BecameError

__all__ = ["RunDirectory", "read_results", "write_summary"]


@dataclass(frozen=True)
class RunDirectory:
    """Where one run's results are, or will be."""

    out: Path
    method: str
    seed: int

    @property
    def results_file(self) -> Path:
        """The file of the results."""
        return self.out / f"{self.method}-seed{self.seed}" / "results.json"

    def finished(self, backend: str, benchmark: str, config: dict[str, Any]) -> RunResult | None:
        """Return the result if this very run has finished before, None if the place is free.

        Raises:
            BecameError: if the place holds another configuration's run, or a file that is no result.
        """
        if not self.results_file.exists():
            return None
        found = _read(self.results_file)
        theirs = {"backend": found.backend, "benchmark": found.benchmark, **found.config}
        # Through JSON, as theirs went: tuples become lists.
        ours = json.loads(json.dumps({"backend": backend, "benchmark": benchmark, **config}))
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                raise BecameError(
                    f"{self.results_file} is a run with {name} = {theirs.get(name)}, not {ours.get(name)}; "
                    "choose another --out."
                )
        return found

    def save(self, result: RunResult) -> None:
        """Write the results."""
        _write(self.results_file, json.dumps(result.to_json(), indent=2) + "\n")


def check_writable(out: Path) -> None:
    """Raise a BecameError unless files can be made in this folder, which is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BecameError(f"cannot write to {out}: {error.strerror}; choose another --out.") from None


def write_summary(out: Path) -> None:
    """Write ``OUT/summary.csv``, a row for each finished run that the folder holds."""
    rows = []
    for result in read_results(out):
        rows.append(
            {
                "backend": result.backend,
                "benchmark": result.benchmark,
                "method": result.method,
                "seed": result.seed,
                **asdict(result.scores),
                **{
                    f"class_incremental_{name}": value
                    for name, value in asdict(result.class_incremental_scores).items()
                },
                "epochs": sum(result.epochs),
                "seconds": result.seconds["total"],
            }
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(out / "summary.csv", text.getvalue())


def read_results(out: Path) -> list[RunResult]:
    """Return all finished runs of a folder, sorted by the names of their own folders.

    Raises:
        BecameError: if a file is no result.
    """
    return [_read(file) for file in sorted(out.glob("*/results.json"))]


def _read(file: Path) -> RunResult:
    try:
        return RunResult.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BecameError(f"{file} is damaged or no run's results; move it away or choose another --out.") from None
    except OSError as error:
        raise BecameError(f"cannot read {file}: {error.strerror}.") from None


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BecameError(f"cannot write {file}: {error.strerror}.") from None
