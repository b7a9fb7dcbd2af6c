"""The folder of a comparison: ``OUT/summary.csv``, and ``OUT/<method>-seed<k>/`` for each run.

| in a run's folder | what it is |
| --- | --- |
| config.json | what runs: configuration, options given, backend, versions, git revision, a digest of the data |
| events.jsonl | what happened, line by line |
| events.out.tfevents.… | the same for TensorBoard, if asked for |
| checkpoints/ | the last two states, to go on from |
| results.json | what came out, once it is finished |
| lock | while a process is at work in it |

A file is written whole under another name and then renamed, so that what is there is never half a file; JSON is sealed.
A killed process can leave such another name, a checkpoint too many and its lock: whoever locks next removes them.
"""

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.runs.checkpoints import Checkpoints, tidy
from adapters.runs.events import EventLog
from adapters.runs.files import DamagedError, read_sealed, remove_temporary_files, write_file, write_sealed
from adapters.runs.lock import locked
from adapters.runs.provenance import revision, versions
from adapters.runs.results import RunResult
from adapters.runs.settings import difference, fingerprint
from became_core import BecameError
from became_core.continual import Method, TaskStream, Training

__all__ = ["RunDirectory", "check_writable", "read_results", "write_summary"]


@dataclass(frozen=True)
class RunDirectory:
    """Where one run is, or will be."""

    out: Path
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.method}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.out / self.name

    @property
    def results_file(self) -> Path:
        """The file of the results."""
        return self.folder / "results.json"

    @property
    def config_file(self) -> Path:
        """The file of what runs."""
        return self.folder / "config.json"

    @property
    def events(self) -> EventLog:
        """What happened."""
        return EventLog(self.folder / "events.jsonl")

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on from, or a result."""
        return self.results_file.exists() or any((self.folder / "checkpoints").glob("*.json"))

    def checkpoints(self, stream: TaskStream, method: Method, training: Training) -> Checkpoints:
        """Return the run's checkpoints."""
        return Checkpoints(self.folder / "checkpoints", stream, method, training, self.seed)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out for the time of this context; first remove what killed processes left.

        Raises:
            BecameError: if another process is at work in the folder, or it cannot be written to.
        """
        with locked(self.folder / "lock") as alone:
            if alone:
                remove_temporary_files(self.folder, r"(?:config|results)\.json")
                tidy(self.folder / "checkpoints")
            yield

    def finished(self, backend: str, benchmark: str, config: dict[str, Any]) -> RunResult | None:
        """Return the result if this very run has finished before, None if it has not.

        Raises:
            BecameError: if the place holds another configuration's run, or a file that is no result.
        """
        if not self.results_file.exists():
            return None
        found = _read(self.results_file)
        theirs = {"backend": _last(found.backend), "benchmark": found.benchmark, **found.config}
        _check_equal(self.results_file, theirs, {"backend": backend, "benchmark": benchmark, **config})
        return found

    def check_unfinished(self, backend: str, benchmark: str, config: dict[str, Any], *, resume: bool) -> str:
        """Return the backends that have worked on this run by the end, in order: "torch", or "torch+jax".

        Args:
            backend: the present one.
            benchmark: its name.
            config: the configuration.
            resume: whether another backend's run may be gone on with.

        Raises:
            BecameError: if there are checkpoints of another configuration's run, or of another backend's.
        """
        if not self.begun:  # then a configuration alone is nothing that could be lost
            return backend
        try:
            found = read_sealed(self.config_file)
            before, theirs = str(found["backend"]), {"benchmark": found["benchmark"], **found["config"]}
        except (DamagedError, KeyError, TypeError):
            raise BecameError(
                f"{self.config_file} is damaged; move {self.folder} away or choose another --out."
            ) from None
        _check_equal(self.config_file, theirs, {"benchmark": benchmark, **config})
        if _last(before) == backend:
            return before
        if not resume:
            raise BecameError(
                f"{self.folder} is an unfinished run on {before}; give --resume to go on with it on {backend}, or "
                "choose another --out."
            )
        return f"{before}+{backend}"

    def write_config(
        self,
        backends: str,
        benchmark: str,
        config: dict[str, Any],
        stream: TaskStream,
        *,
        given: dict[str, Any] | None = None,
    ) -> None:
        """Write what runs, and with what; ``given`` is what a command needs to go on with it by itself."""
        values = {
            "backend": backends,
            "benchmark": benchmark,
            "method": self.method,
            "seed": self.seed,
            "config": config,
            "given": given,
            "data": fingerprint(stream.dataset),
            "versions": versions(),
            "revision": revision(),
        }
        write_sealed(self.config_file, values, indent=2)

    def save(self, result: RunResult) -> None:
        """Write the results."""
        write_sealed(self.results_file, result.to_json(), indent=2)


def check_writable(out: Path) -> None:
    """Raise a BecameError unless files can be made in this folder, which is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(
            dir=out
        ):  # it has no name where the system can do without, so a kill leaves nothing
            pass
    except OSError as error:
        raise BecameError(f"cannot write to {out}: {error.strerror}; choose another --out.") from None


def write_summary(out: Path) -> None:
    """Write ``OUT/summary.csv``, a row for each finished run that the folder holds.

    Another process that is writing it is waited for: the last to finish a run then sees the results of all.

    Raises:
        BecameError: if a file is no result, or the folder cannot be written to.
    """
    with locked(out / "summary.lock", wait=True) as alone:
        if alone:
            remove_temporary_files(out, r"summary\.csv")
        write_file(out / "summary.csv", _summary(read_results(out)).encode())


def _summary(results: Sequence[RunResult]) -> str:
    """Return the results as comma-separated values."""
    rows = []
    for result in results:
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
    return text.getvalue()


def read_results(out: Path) -> list[RunResult]:
    """Return all finished runs of a folder, sorted by the names of their own folders.

    Raises:
        BecameError: if a file is no result.
    """
    return [_read(file) for file in sorted(out.glob("*/results.json"))]


def _read(file: Path) -> RunResult:
    try:
        return RunResult.from_json(read_sealed(file))
    except (DamagedError, KeyError, TypeError):
        raise BecameError(f"{file} is damaged or no run's results; move it away or choose another --out.") from None


def _last(backends: str) -> str:
    return backends.rpartition("+")[2]


def _check_equal(file: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    # Through JSON, as theirs went: tuples become lists.
    found = difference(theirs, json.loads(json.dumps(ours)))
    if found is not None:
        name, there, here = found
        raise BecameError(f"{file} is a run with {name} = {there}, not {here}; choose another --out.")
