"""The folder of a comparison: ``OUT/summary.csv``, and ``OUT/<method>-seed<k>/`` for each run.

| in a run's folder | what it is |
| --- | --- |
| config.json | what runs: configuration, hints, backend, versions, git revision, a digest of the data |
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from adapters.benchmarks.location import data_directory
from adapters.runs.checkpoints import Checkpoints, tidy
from adapters.runs.configuration import Configuration
from adapters.runs.events import EventLog
from adapters.runs.files import DamagedError, read_sealed, remove_temporary_files, write_file, write_sealed
from adapters.runs.lock import locked
from adapters.runs.provenance import revision, versions
from adapters.runs.results import RunResult
from adapters.runs.settings import difference, fingerprint, is_of
from became_core import BecameError
from became_core.continual import Method, TaskStream, Training

__all__ = [
    "Record",
    "RunDirectory",
    "check_writable",
    "finished_runs",
    "read_record",
    "read_result",
    "read_results",
    "write_summary",
]


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run, which need not exist yet.

    >>> RunDirectory(Path("runs/short"), "became+sgp", 3).name
    'became+sgp-seed3'

    Attributes:
        out: the folder of the comparison, as ``--out`` names it.
        method: the run's method, METHOD or METHOD+PROJECTOR.
        seed: the run's seed.
    """

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
        """The file of the run's results."""
        return self.folder / "results.json"

    @property
    def config_file(self) -> Path:
        """The file of the run's configuration."""
        return self.folder / "config.json"

    @property
    def events(self) -> EventLog:
        """The file of the run's events."""
        return EventLog(self.folder / "events.jsonl")

    @property
    def started(self) -> bool:
        """Whether there is a checkpoint to resume from, or a result."""
        return self.results_file.exists() or any((self.folder / "checkpoints").glob("*.json"))

    @property
    def threads(self) -> int | None:
        """With how many threads the run was computed, as its configuration says; None if it does not say."""
        try:
            threads = read_sealed(self.config_file)["hints"]["threads"]
        except (BecameError, DamagedError, KeyError, TypeError):
            return None
        return threads if type(threads) is int else None

    def checkpoints(self, stream: TaskStream, method: Method, training: Training) -> Checkpoints:
        """Return the run's checkpoints."""
        return Checkpoints(self.folder / "checkpoints", stream, method, training, self.seed)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out for the time of this context; first remove what killed processes left.

        Raises:
            BusyError: if another process is at work in the folder.
            BecameError: if the folder cannot be written to.
        """
        with locked(self.folder / "lock"):
            remove_temporary_files(self.folder, r"(?:config|results)\.json")
            tidy(self.folder / "checkpoints")
            yield

    def finished(self, backend: str, config: dict[str, Any]) -> RunResult | None:
        """Return the result if this very run has finished before, None if it has not.

        Args:
            backend: the name of the present backend.
            config: the run's configuration, as ``Configuration.to_json`` gives it.

        Raises:
            BecameError: if the folder holds another configuration's run, or a file that is no result.
        """
        if not self.results_file.exists():
            return None
        result = read_result(self.results_file)
        theirs = {"backend": _last(result.backend), **result.config}
        _check_equal(self.results_file, theirs, {"backend": backend, **config})
        return result

    def check_data(self, stream: TaskStream) -> None:
        """Raise a BecameError if the configuration says that the run was of other data than those of these tasks."""
        try:
            theirs = read_sealed(self.config_file)["data"]
        except (BecameError, DamagedError, KeyError, TypeError):
            return  # the results are whole, and there is nothing to compare
        if not is_of(theirs, stream.dataset):
            raise BecameError(
                f"{self.results_file} is a run on other data than {stream.dataset.name} as it is now; choose another "
                "--out."
            )

    def check_unfinished(self, backend: str, config: dict[str, Any], *, resume: bool) -> str:
        """Return the backends that will have worked on this run, in order: "torch", or "torch+jax".

        Args:
            backend: the name of the present backend.
            config: the run's configuration.
            resume: whether a run of another backend may be resumed.

        Raises:
            BecameError: if there are checkpoints of another configuration's run, or of another backend's.
        """
        if not self.started:  # then a configuration alone is nothing that could be lost
            return backend
        try:
            record = read_sealed(self.config_file)
            before, theirs = str(record["backend"]), dict(record["config"])
        except (DamagedError, KeyError, TypeError, ValueError):
            raise BecameError(
                f"{self.config_file} is damaged; move {self.folder} away or choose another --out."
            ) from None
        _check_equal(self.config_file, theirs, config)
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
        config: dict[str, Any],
        stream: TaskStream,
        *,
        hints: dict[str, Any] | None = None,
        preset: str | None = None,
    ) -> None:
        """Write what runs, and with what.

        Args:
            backends: all that have worked on the run, "torch" or "torch+jax".
            config: the run's configuration.
            stream: its tasks.
            hints: the values that the result does not depend on, with which a resumed run goes on by default.
            preset: the name of the preset that the configuration was made from.
        """
        values = {
            "backend": backends,
            "benchmark": config.get("benchmark"),
            "method": self.method,
            "seed": self.seed,
            "config": config,
            "hints": hints or {},
            "preset": preset,
            "data": fingerprint(stream.dataset),
            "versions": versions(),
            "revision": revision(),
        }
        write_sealed(self.config_file, values, indent=2)

    def save(self, result: RunResult) -> None:
        """Write the results."""
        write_sealed(self.results_file, result.to_json(), indent=2)


@dataclass(frozen=True)
class Record:
    """What a ``config.json`` says of a run.

    Attributes:
        backend: the last backend that worked on it.
        method: its method, METHOD or METHOD+PROJECTOR.
        seed: its seed.
        preset: the preset that its configuration was made from; None if that is not known.
        configuration: its configuration, with its hints.
        data: the digest of its data; None if that is not known.
    """

    backend: str
    method: str
    seed: int
    preset: str | None
    configuration: Configuration
    data: str | None


def read_record(file: Path) -> Record:
    """Return what a ``config.json`` says of a run.

    A folder of data that no longer exists is left out if BECAME_DATA_DIR names another one; else a loader says that it
    is missing, and takes no other data in its place.

    Raises:
        BecameError: if the file is damaged, holds no configuration, or one of another version.
    """
    try:
        values = read_sealed(file)
    except DamagedError:
        raise BecameError(f"{file} is damaged; move {file.parent} away.") from None
    try:
        method, seed, config = str(values["method"]), int(values["seed"]), dict(values["config"])
        hints, backend, preset = dict(values.get("hints") or {}), _last(str(values["backend"])), values.get("preset")
        data_dir = None if hints.get("data_dir") is None else Path(hints["data_dir"])
        data = values.get("data")
    except (KeyError, TypeError, ValueError):
        raise BecameError(f"{file} holds no run's configuration; give the command that started the run.") from None
    is_elsewhere = data_dir is not None and not data_dir.exists() and data_directory(None) is not None
    known = {each.name for each in fields(Configuration)}  # a later version may have written others
    hints = {name: value for name, value in hints.items() if name in known} | {
        "data_dir": None if is_elsewhere else data_dir
    }
    configuration = replace(Configuration.from_json(config, method, file=str(file)), **hints)
    return Record(backend, method, seed, preset, configuration, data if isinstance(data, str) else None)


def check_writable(out: Path) -> None:
    """Raise a BecameError unless files can be made in this folder, which is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # where the system can do without, it has no name, so that a kill leaves nothing
    except OSError as error:
        raise BecameError(f"cannot write to {out}: {error.strerror}; choose another --out.") from None


def write_summary(out: Path) -> None:
    """Write ``OUT/summary.csv``, a row for each finished run that the folder holds.

    Another process that is writing it is waited for: the last to finish a run then sees the results of all.

    Raises:
        BecameError: if a file is no result, or the folder cannot be written to.
    """
    with locked(out / "summary.lock", wait=True):
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
                "unit": result.unit,
                "score_on": result.config.get("score_on", "test"),
                **asdict(result.scores),
                **{
                    f"class_incremental_{name}": value
                    for name, value in asdict(result.class_incremental_scores).items()
                },
                "loss": result.mean_loss,
                "correlation": result.mean_correlation,
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
    """Return all finished runs of a folder, sorted by the names of their own folders; none if there are none.

    Raises:
        BecameError: if a file is no result.
    """
    return [read_result(file) for file in sorted(out.glob("*/results.json"))]


def finished_runs(outs: Sequence[Path]) -> list[RunResult]:
    """Return the finished runs of some folders, in the order of the folders.

    Raises:
        BecameError: if a folder has none, or a file is no result.
    """
    runs = []
    for out in outs:
        results = read_results(out)
        if not results:
            raise BecameError(f"{_text(out)} holds no finished runs; give a folder that --out named.")
        runs += results
    return runs


def read_result(file: Path) -> RunResult:
    """Return the result that a file holds.

    Raises:
        BecameError: if it holds none, or cannot be read.
    """
    try:
        values = read_sealed(file)
    except DamagedError:
        values = {}  # which is no result
    try:
        return RunResult.from_json(values)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise BecameError(
            f"{_text(file)} is damaged or no run's results; move it away or choose another --out."
        ) from None


def _text(path: Path) -> str:
    """A path as a message can show it: its name may hold bytes that are no text."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


def _last(backends: str) -> str:
    return backends.rpartition("+")[2]


def _check_equal(file: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    if "benchmark" in ours and "benchmark" not in theirs:
        raise BecameError(f"{file} is of an earlier version; finish that run with it, or choose another --out.")
    # Ours goes through JSON as theirs did: tuples become lists.
    differing = difference(theirs, json.loads(json.dumps(ours)))
    if differing is not None:
        name, there, here = differing
        raise BecameError(f"{file} is a run with {name} = {there}, not {here}; choose another --out.")
