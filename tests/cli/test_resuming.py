"""The command is interrupted in every way there is, given again, and ends with what it would have ended with."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.backend.entry import Backend, BackendName, load_backend
from adapters.cli.main import main
from adapters.runs import RunDirectory
from adapters.runs.events import EventLog
from became_core.continual import EpochEnd, Learner, Trained

RUN = [
    "--preset",
    "quick",
    "--methods",
    "became",
    "--epochs",
    "2",
    "--stage2-epochs",
    "1",
    "--batch-size",
    "25",
    "--first",
    "3",
]
EPOCHS = 9
# How many processes are killed: each must start its framework first. `nox -s stress` kills many more.
KILLS = int(os.environ.get("BECAME_KILLS", "2"))
# Seconds after which a process that has not gone on counts as hanging, also where it compiles beside busy processes.
WAIT = 600


def command(out: Path, *more: str) -> list[str]:
    return [*RUN, "--curvature-samples", "100", *more, "--out", str(out)]


def result(out: Path, name: str = "became-seed0") -> dict[str, Any]:
    """What came out, seconds aside."""
    values: dict[str, Any] = json.loads((out / name / "results.json").read_text())
    return {key: value for key, value in values.items() if key not in ("seconds", "sha256")}


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def events(out: Path) -> list[str]:
    text = (out / "became-seed0" / "events.jsonl").read_text()
    return [json.loads(line)["event"] for line in text.splitlines()]


@pytest.fixture(scope="module")
def adapter(backend: str) -> Backend:
    """Of the session's framework, set up as by its command; PyTorch's where the session has none."""
    names: dict[str, BackendName] = {"jax": "jax", "tensorflow": "tensorflow"}
    return load_backend(names.get(backend, "torch"))


@pytest.fixture(scope="module")
def expected(adapter: Backend, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result without any interruption."""
    out = tmp_path_factory.mktemp("whole")
    assert main(adapter, command(out)) == 0
    return result(out)


@pytest.mark.parametrize("method", ["became", "became+trgp"])
def test_a_run_in_parts_is_the_run_to_the_bit(
    adapter: Backend, method: str, expected: dict[str, Any], after_saves: Callable[[int], None], tmp_path: Path
) -> None:
    """In single precision, where a product rounds as its factors lie in memory."""
    if method != "became":
        assert main(adapter, command(tmp_path / "whole", "--methods", method)) == 0
        expected = result(tmp_path / "whole", f"{method}-seed0")
    # JAX and TensorFlow compile anew in every part: there are fewer, which still end within tasks and between stages.
    saves, parts = 2 if adapter.name == "torch" else 5, 1
    after_saves(saves)
    while main(adapter, command(tmp_path / "parts", "--methods", method)) == 130:
        after_saves(saves)
        parts += 1
    assert parts == (EPOCHS + 3) // saves + 1
    assert result(tmp_path / "parts", f"{method}-seed0") == expected


@pytest.mark.timeout(300 + WAIT * KILLS)
def test_a_killed_process_loses_an_epoch_at_most(adapter: Backend, expected: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL at random moments, in the framework; ``tests/runs/test_killed.py`` has every moment of every file."""
    draw, kills = random.Random(KILLS), 0
    while kills < KILLS:
        out = tmp_path / f"after-{kills}"
        folder = out / "became-seed0"
        while kills < KILLS and not (folder / "results.json").exists():
            kill_at_a_moment(adapter, out, draw)
            kills += 1
        assert main(adapter, command(out)) == 0
        assert result(out) == expected
        assert "end" in events(out)
        left = {"checkpoints", "config.json", "events.jsonl", "results.json"}
        assert {path.name for path in folder.iterdir()} == left
        assert {path.name for path in out.iterdir()} == {"became-seed0", "summary.csv"}
        assert len(list((folder / "checkpoints").iterdir())) == 4


def kill_at_a_moment(adapter: Backend, out: Path, draw: random.Random) -> None:
    """Let a process begin or go on with the run; kill it a little after it is heard of, wherever it then is.

    It is heard of as it begins, before anything is compiled, and after every epoch.
    """
    log, heard = out / "became-seed0" / "events.jsonl", draw.randint(1, 3)
    before = lines(log)
    arguments = [sys.executable, "-m", f"adapters.{adapter.name}.run", *command(out)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + WAIT
            while process.poll() is None and lines(log) < before + heard:
                assert time.monotonic() < until
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.3))
        finally:
            process.kill()
        _, said = process.communicate()
    assert "Traceback" not in said


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_answered_once_the_epoch_is_saved(
    adapter: Backend,
    number: signal.Signals,
    status: int,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tell, usual = EventLog.on_epoch_end, signal.getsignal(number)

    def send(self: EventLog, event: EpochEnd) -> None:
        tell(self, event)
        if (event.task, event.stage) == (1, 2):
            signal.raise_signal(number)

    monkeypatch.setattr(EventLog, "on_epoch_end", send)
    assert main(adapter, command(tmp_path)) == status
    said = capfd.readouterr().err
    where = "became-seed0 is saved after task 2/3, stage 2, epoch 1"
    assert f"stopped: {where}; the same command goes on from there." in said
    assert signal.getsignal(number) is usual
    assert not (tmp_path / "became-seed0" / "lock").exists()
    monkeypatch.undo()
    assert main(adapter, command(tmp_path, "--resume")) == 0
    assert "goes on after task 2/3, stage 2, epoch 1" in capfd.readouterr().out
    assert result(tmp_path) == expected
    # Nothing was done twice.
    assert events(tmp_path).count("epoch") == sum(expected["epochs"]) == EPOCHS


def test_to_resume_there_must_be_something(
    adapter: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(adapter, command(tmp_path / "out", "--resume")) == 2
    assert f"{tmp_path / 'out'} holds nothing to resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_configurations_checkpoints_are_refused_untouched(
    adapter: Backend, after_saves: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after_saves(2)
    assert main(adapter, command(tmp_path)) == 130
    before = files(tmp_path)
    assert main(adapter, command(tmp_path, "--threshold", "0.5")) == 2
    assert "is a run with threshold = 0.95, not 0.5; choose another --out" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_another_backend_goes_on_if_it_is_told_to(
    adapter: Backend,
    after_saves: Callable[[int], None],
    expected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = replace(adapter, name="another")
    after_saves(5)
    assert main(adapter, command(tmp_path)) == 130
    after_saves(0)
    assert main(other, command(tmp_path)) == 2
    assert (
        f"is an unfinished run on {adapter.name}; give --resume to go on with it on another" in capsys.readouterr().err
    )
    assert main(other, command(tmp_path, "--resume")) == 0
    assert result(tmp_path) == {**expected, "backend": f"{adapter.name}+another"}
    assert main(other, command(tmp_path)) == 0  # it is shown


def test_what_kept_nothing_is_begun_anew_with_any_configuration(
    adapter: Backend, expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(adapter, command(tmp_path, "--lr", "1e30")) == 2
    assert "the training loss became" in capsys.readouterr().err
    assert main(adapter, command(tmp_path)) == 0
    assert result(tmp_path) == expected


def test_a_diverging_run_names_its_last_good_checkpoint(
    adapter: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def build(*arguments: Any, **options: Any) -> Learner:
        learner = adapter.learner(*arguments, **options)
        train = learner.train

        def diverge(*arguments: Any) -> Trained:
            nonlocal calls
            calls += 1
            trained = train(*arguments)
            return trained._replace(loss=math.nan) if calls == 5 else trained

        monkeypatch.setattr(learner, "train", diverge)
        return learner

    assert main(replace(adapter, learner=build), command(tmp_path)) == 2
    said = capsys.readouterr().err
    last = tmp_path / "became-seed0" / "checkpoints" / "000005.json"
    assert "the training loss became nan in task 2, stage 1, epoch 2; try a smaller" in said
    assert said.endswith(f"; the last good checkpoint is {last}.\n")
    assert last.exists()


def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(
    adapter: Backend,
    after_saves: Callable[[int], None],
    expected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No file may become larger than a limit: to a process that is as a disk without room."""
    after_saves(2)
    assert main(adapter, command(tmp_path)) == 130
    capsys.readouterr()
    before = {name: content for name, content in files(tmp_path).items() if "checkpoints" in name}
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    after_saves(0)
    try:
        assert main(adapter, command(tmp_path)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    said = capsys.readouterr().err
    assert "000003.safetensors: File too large; the last good checkpoint is " in said
    assert len(said.splitlines()) == 1
    assert {name: content for name, content in files(tmp_path).items() if "checkpoints" in name} == before
    assert main(adapter, command(tmp_path)) == 0
    assert result(tmp_path) == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_is_one_sentence(
    adapter: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    try:
        assert main(adapter, command(tmp_path / "out")) == 2
    finally:
        tmp_path.chmod(0o700)
    assert f"cannot write to {tmp_path / 'out'}: Permission denied" in capsys.readouterr().err


def test_two_processes_are_kept_apart_and_a_dead_ones_lock_is_taken_over(
    adapter: Backend, expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path, "became", 0)
    with run.locked():
        before = files(tmp_path)
        assert main(adapter, command(tmp_path)) == 2
        assert f"another process ({os.getpid()}) is at work in {run.folder}" in capsys.readouterr().err
        assert files(tmp_path) == before
    with replace(run, seed=1).locked():  # another run's folder
        (run.folder / "lock").write_text("999999\n")
        assert main(adapter, command(tmp_path)) == 0
    assert result(tmp_path) == expected
