"""A process that is killed at any moment of a run leaves nothing that the next start does not put right.

Convention: a moment is what the folder of a comparison holds, as a kill there would leave it: files by their names in
it, before or after each call that changes a file, and with a file that is being written cut in half. The next start is
the command itself, with a learner in NumPy.
"""

import csv
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.backend.entry import Backend
from adapters.benchmarks.assembly import Part
from adapters.cli.main import main
from adapters.runs import RunDirectory, write_summary
from adapters.runs.lock import locked
from became_core import BecameError
from became_core.continual import Learner, TaskStream
from reference.learner import ReferenceLearner

Files = dict[str, bytes]
RUN = "ewc-seed0"
# Tasks and epochs are six together, of which the last two have checkpoints.
CHECKPOINTS = {
    f"{RUN}/checkpoints/{number}.{kind}" for number in ("000005", "000006") for kind in ("json", "safetensors")
}
FINISHED = CHECKPOINTS | {f"{RUN}/{name}" for name in ("config.json", "events.jsonl", "results.json")} | {"summary.csv"}
USERS = {
    f"{RUN}/notes.txt": b"mine",
    f"{RUN}/.results.json.swp": b"an editor's",
    f"{RUN}/checkpoints/best.safetensors": b"mine",
    f"{RUN}/checkpoints/000001.json.bak": b"mine",
    "lock": b"mine",
}


def build(network: str, stream: TaskStream, device: str, seed: int, **options: Any) -> Learner:  # noqa: ARG001
    return ReferenceLearner(stream, hidden=(4, 4), seed=seed)


def start(out: Path) -> int:
    options = "--methods ewc --epochs 2 --batch-size 256 --first 2 --curvature-samples 20 --quiet"
    return main(Backend("reference", build, lambda: None), [*options.split(), "--out", str(out)])


def files(out: Path) -> Files:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def put(out: Path, content: Files) -> None:
    for name, value in content.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(value)


def result(out: Path) -> dict[str, Any]:
    """What came out, seconds aside."""
    values: dict[str, Any] = json.loads((out / RUN / "results.json").read_text())
    return {name: value for name, value in values.items() if name not in ("seconds", "sha256")}


@pytest.fixture(autouse=True)
def digits_read_once(monkeypatch: pytest.MonkeyPatch, digits: Part) -> None:
    monkeypatch.setattr("adapters.benchmarks.mnist._read_digits", lambda: digits)


@pytest.fixture(scope="module")
def digits() -> Part:
    """A tenth of them."""
    from adapters.benchmarks.mnist import _read_digits

    images, labels = _read_digits()
    return images[::10], labels[::10]


@pytest.fixture
def moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Files]:
    """Every moment of a run from its begin to its end."""
    out, seen = tmp_path / "watched", list[Files]()

    def look() -> None:
        # The next start has another number: it must not come upon its own names by chance.
        now = {re.sub(rf"\.{os.getpid()}$", ".999999999", name): value for name, value in files(out).items()}
        halves = {name: value[: len(value) // 2] for name, value in now.items() if re.fullmatch(r".*\.\d+", name)}
        for moment in (now, now | halves):
            if moment not in seen:
                seen.append(moment)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            look()
            try:
                return function(*arguments, **options)
            finally:
                look()

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "ftruncate", "mkdir", "open", "replace", "unlink"):
            patch.setattr(os, name, watched(getattr(os, name)))
        assert start(out) == 0
    assert seen[-1].keys() == FINISHED
    return seen


def test_the_next_start_after_a_kill_at_any_moment_ends_as_a_run_that_was_not_killed(
    moments: list[Files], tmp_path: Path
) -> None:
    expected = result(tmp_path / "watched")
    names = {re.sub(r"\d+", "1", Path(name).name) for moment in moments for name in moment}
    assert names >= {".config.json.1", ".results.json.1", ".summary.csv.1", ".1.json.1", ".1.safetensors.1", "lock"}
    assert any(orphans(moment) for moment in moments)
    assert any(len(checkpoints(moment)) > 2 for moment in moments)
    for number, moment in enumerate(moments):
        out = tmp_path / str(number)
        put(out, moment | USERS)
        assert start(out) == 0
        assert result(out) == expected
        assert files(out).keys() == FINISHED | USERS.keys()
        assert files(out).items() >= USERS.items()
        assert summarised(out) == [("ewc", "0")]


def orphans(moment: Files) -> set[str]:
    """The arrays of checkpoints that have no JSON."""
    arrays = {name.removesuffix(".safetensors") for name in moment if re.fullmatch(r".*/\d+\.safetensors", name)}
    return arrays - checkpoints(moment)


def checkpoints(moment: Files) -> set[str]:
    return {name.removesuffix(".json") for name in moment if re.fullmatch(r".*/\d+\.json", name)}


def summarised(out: Path) -> list[tuple[str, str]]:
    with (out / "summary.csv").open() as handle:
        return [(row["method"], row["seed"]) for row in csv.DictReader(handle)]


@pytest.mark.parametrize("finished", [True, False])
def test_while_another_process_holds_the_lock_nothing_of_it_is_removed(
    tmp_path: Path, finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path) == 0
    if not finished:
        (tmp_path / RUN / "results.json").unlink()
    put(tmp_path, {f"{RUN}/.results.json.1": b"{", f"{RUN}/checkpoints/000007.safetensors": b""})
    with RunDirectory(tmp_path, "ewc", 0).locked():
        put(tmp_path, {f"{RUN}/.results.json.1": b"{", f"{RUN}/checkpoints/000007.safetensors": b""})
        before = files(tmp_path)
        assert start(tmp_path) == (0 if finished else 2)
        assert files(tmp_path) == before
    assert ("is at work in" in capsys.readouterr().err) != finished
    assert start(tmp_path) == 0
    assert files(tmp_path).keys() == FINISHED


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_finished_run_in_a_read_only_folder_is_shown(tmp_path: Path) -> None:
    assert start(tmp_path) == 0
    (tmp_path / RUN).chmod(0o500)
    try:
        assert start(tmp_path) == 0
    finally:
        (tmp_path / RUN).chmod(0o700)


def test_the_summary_of_a_process_that_waited_for_another_has_the_runs_of_both(tmp_path: Path) -> None:
    assert start(tmp_path) == 0
    (tmp_path / "summary.csv").unlink()
    errors: list[BecameError] = []

    def summarise() -> None:
        try:
            write_summary(tmp_path)
        except BecameError as error:
            errors.append(error)

    with locked(tmp_path / "summary.lock"):
        thread = threading.Thread(target=summarise)
        thread.start()
        thread.join(0.2)  # it may have come to the lock by now
        shutil.copytree(tmp_path / RUN, tmp_path / "the-other-process")
        assert not (tmp_path / "summary.csv").exists()
    thread.join()
    assert errors == []
    assert summarised(tmp_path) == [("ewc", "0"), ("ewc", "0")]
    assert not (tmp_path / "summary.lock").exists()
