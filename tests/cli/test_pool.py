"""Several workers carry out a command's runs: equal results, and whatever dies or is interrupted costs nothing else."""

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from adapters.cli.interruption import InterruptedRun
from adapters.cli.jobs import Job, load_data, requested_jobs
from adapters.cli.main import main
from adapters.cli.options import Request
from adapters.cli.pool import PoolEngine, engine_of
from adapters.cli.running import run_jobs
from adapters.cli.worker import Message, order_of
from adapters.runs.events import Events
from adapters.torch.run import BACKEND
from became_core import BecameError
from tests.processes import WAIT, lines, result, until

RUN = ["--preset", "quick", "--methods", "gpm", "finetune", "--epochs", "2", "--batch-size", "50", "--first", "2"]
NAMES = ["gpm-seed0", "finetune-seed0", "gpm-seed1", "finetune-seed1"]
KILLS = int(os.environ.get("BECAME_KILLS", "1"))


def command(out: Path, *more: str) -> list[str]:
    return [*RUN, *more, "--out", str(out)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one process."""
    out = tmp_path_factory.mktemp("one")
    assert main(BACKEND, command(out, "--seeds", "0", "1", "--quiet")) == 0
    return {name: result(out, name) for name in NAMES}


def test_two_commands_on_one_folder_do_each_run_once_and_to_the_bit(expected: dict[str, Any], tmp_path: Path) -> None:
    """Each has one worker: four runs, in two processes."""
    values = {"epochs": 2, "batch_size": 50, "first": 2}
    request = Request(methods=("gpm", "finetune"), seeds=(0, 1), preset="quick", out=tmp_path, values=values)
    results = []

    def carry_out() -> None:
        engine, _ = engine_of(1, None)
        display: Any = Notes()
        results.append(run_jobs(requested_jobs(request, lambda: BACKEND), display, engine))

    commands = [threading.Thread(target=carry_out) for _ in range(2)]
    for each in commands:
        each.start()
    for each in commands:
        each.join(WAIT)
    assert [[f"{each.method}-seed{each.seed}" for each in of_one] for of_one in results] == [NAMES, NAMES]
    assert {name: result(tmp_path, name) for name in NAMES} == expected
    for name in NAMES:
        events = (tmp_path / name / "events.jsonl").read_text().splitlines()
        assert sum('"begin"' in line for line in events) == 1
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, "summary.csv"}
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 5


@pytest.mark.timeout(60 + WAIT * KILLS)
def test_a_killed_worker_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(KILLS)
    for kill in range(KILLS):
        out = tmp_path / str(kill)
        # In a shorter run there is no time to strike.
        long = ["--epochs", "30"]
        heard, after = draw.randint(1, 3), draw.uniform(0, 0.1)

        def strike(gpm: Path = out / "gpm-seed0", heard: int = heard, after: float = after) -> None:
            until(lambda: lines(gpm / "events.jsonl") >= heard)
            time.sleep(after)
            os.kill(int((gpm / "lock").read_text()), signal.SIGKILL)  # the lock says who works there

        (out / "finetune-seed0").mkdir(parents=True)
        (out / "finetune-seed0" / "checkpoints").touch()  # where a folder belongs
        striker = threading.Thread(target=strike)
        striker.start()
        assert main(BACKEND, command(out, *long, "--methods", "gpm", "finetune", "ewc", "--workers", "2")) == 2
        striker.join()
        said = capsys.readouterr()
        ended = (
            "its process was ended by SIGKILL (as the system does when memory is short); what it had saved is there."
        )
        assert f"error: gpm-seed0: {ended}" in said.err
        assert "error: finetune-seed0: cannot " in said.err
        assert "2 of 3 runs failed; the same command tries them again: gpm-seed0, finetune-seed0." in said.err
        assert "Traceback" not in said.err
        assert "ewc" in said.out[said.out.index("Accuracies in percent") :]


def test_ctrl_c_saves_all_runs_and_the_command_goes_on_from_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs = [tmp_path / name / "events.jsonl" for name in NAMES[:2]]

    def press() -> None:
        until(lambda: all(lines(log) > 2 for log in logs))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    assert main(BACKEND, command(tmp_path, "--epochs", "1500", "--workers", "2", "--log", "json")) == 130
    said = capfd.readouterr()
    assert "every run is saved after its epoch first; the same signal again stops at once." in said.err
    assert "stopped: of 2 runs 2 saved on the way; the same command goes on from there." in said.err
    shown = [json.loads(line) for line in said.out.splitlines()]
    for log in logs:
        events = [json.loads(line) for line in log.read_text().splitlines()]
        told = [event for event in shown if event["run"] == log.parent.name]
        about = {"time": None, "run": log.parent.name}
        assert [{**event, **about} for event in told] == [{**event, **about} for event in events]
        (last,) = sorted((log.parent / "checkpoints").glob("*.json"))[-1:]
        assert int(last.stem) == sum(event["event"] == "epoch" for event in events)  # not an epoch is lost
        assert not (log.parent / "lock").exists()


ORDERING = """import os, pickle, sys
from adapters.cli.worker import WorkerProcess
for message in WorkerProcess(dict(os.environ)).messages(pickle.load(sys.stdin.buffer)):
    pass
"""


def test_a_worker_saves_its_run_when_its_command_is_killed(tmp_path: Path) -> None:
    arguments = Request(methods=("gpm",), out=tmp_path, preset="quick", values={"epochs": 1500})
    (job,) = requested_jobs(arguments, lambda: BACKEND)
    log, lock = job.run.events.file, job.run.folder / "lock"
    with subprocess.Popen([sys.executable, "-c", ORDERING], stdin=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            pickle.dump(order_of(job), process.stdin)
            process.stdin.close()
            until(lambda: lines(log) > 2)
            worker = int(lock.read_text())
        finally:
            process.kill()
    until(lambda: not Path(f"/proc/{worker}").exists() or not lock.exists())
    assert not lock.exists()  # it did not die with the lock in its hand
    (last,) = sorted((job.run.folder / "checkpoints").glob("*.json"))[-1:]
    assert int(last.stem) == sum('"epoch"' in line for line in log.read_text().splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "--workers is 0; it must be at least 1."),
        (
            ["--workers", "2", "--scheduler", "tcp://x:1"],
            "--workers are processes of this machine, and --scheduler has",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(BACKEND, command(tmp_path / "out", *words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variable", "what"),
    [("TORCHELASTIC_RUN_ID", "torchrun"), ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS")],
)
def test_processes_that_share_a_run_and_workers_exclude_each_other(
    variable: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "none")
    assert engine_of(None, None)[1] == 1
    with pytest.raises(BecameError, match=f"{what} shares one; use one of them"):
        engine_of(2, None)


def test_threads_are_divided_among_workers_unless_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("adapters.cli.jobs.available_threads", lambda: 8)
    monkeypatch.setattr("adapters.cli.jobs.threads_for", lambda network, shape, norm: 1 if network == "mlp" else None)
    for network, asked_for, share, threads in [
        ("alexnet", {}, 1, None),
        ("alexnet", {}, 2, 4),
        ("alexnet", {}, 3, 2),
        ("alexnet", {}, 20, 1),
        ("alexnet", {"threads": 5}, 4, 5),
        ("mlp", {}, 2, 1),
    ]:
        values = {"network": network, **asked_for}
        (job,) = requested_jobs(Request(methods=("gpm",), out=tmp_path, values=values), lambda: BACKEND)
        assert Job(job.run, BACKEND, job.configuration, share=share).threads(job.stream()) == threads


class ScriptedPool:
    """Says what a test has written down, each time that a run is started."""

    def __init__(self, script: dict[str, list[list[Message]]], most: int) -> None:
        self.script, self.most, self.stopped = script, most, False
        self.started: list[str] = []
        self.said: deque[tuple[str, Message]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, job: Job) -> bool:
        if len(self.said) >= self.most:
            return False
        self.started.append(job.run.name)
        self.said.extend((job.run.name, message) for message in self.script[job.run.name].pop(0))
        return True

    def message(self, timeout: float) -> tuple[str, Message] | None:
        return self.said.popleft() if self.said else None

    def stop(self) -> None:
        self.stopped = True


class Notes(Events):
    def __init__(self) -> None:
        self.told: list[str] = []

    def add(self, name: str, **values: Any) -> None:
        self.told.append(name)

    def note(self, text: str) -> None:
        self.told.append(text)

    def failed(self, run: Any, message: str) -> None:
        self.told.append(f"{run.name} failed: {message}")

    def result(self, run: Any, result: Any, *, before: bool) -> None:
        self.told.append(f"{run.name} finished")

    @contextmanager
    def several(self, count: int) -> Iterator[None]:
        yield

    @contextmanager
    def watching(self, run: Any, *about: Any) -> Iterator[Events]:
        self.told.append(f"{run.name} shown")
        yield self
        self.told.append(f"{run.name} gone")


def carried_out(pool: ScriptedPool, out: Path, notes: Any) -> list[Any]:
    jobs = requested_jobs(Request(methods=("gpm", "finetune"), out=out), lambda: BACKEND)
    return [each is not None for each in PoolEngine(lambda out: pool)(jobs, load_data, notes)]


def test_a_run_that_another_process_works_on_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.cli.pool.AGAIN", 0.01)
    monkeypatch.setattr("adapters.cli.pool.read_result", lambda file: file)
    busy: list[Message] = [("busy", "another process (7) is at work")]
    script: dict[str, list[list[Message]]] = {
        "gpm-seed0": [busy, busy, [("finished", "")]],
        "finetune-seed0": [[("finished", "")]],
    }
    pool, notes = ScriptedPool(script, most=1), Notes()
    assert carried_out(pool, tmp_path, notes) == [True, True]
    assert notes.told == [
        "gpm-seed0  another process works on it, and it is waited for.",  # said once
        "finetune-seed0 finished",
        "gpm-seed0 finished",
    ]
    assert pool.started == ["gpm-seed0", "finetune-seed0", "gpm-seed0", "gpm-seed0"]


def test_a_run_that_begins_again_elsewhere_has_one_bar_and_late_messages_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.cli.pool.read_result", lambda file: file)
    watch: Message = ("watch", "torch", 2, 1)
    late: Message = ("event", "late", {})
    script: dict[str, list[list[Message]]] = {
        "gpm-seed0": [[watch, ("event", "begin", {}), watch, ("event", "resume", {}), ("finished", ""), late]],
        "finetune-seed0": [[watch, ("failed", "the sentence")]],
    }
    notes = Notes()
    assert carried_out(ScriptedPool(script, most=9), tmp_path, notes) == [True, False]
    assert notes.told == [
        *("gpm-seed0 shown", "begin", "gpm-seed0 gone", "gpm-seed0 shown", "resume", "gpm-seed0 gone"),
        "gpm-seed0 finished",
        *("finetune-seed0 shown", "finetune-seed0 gone", "finetune-seed0 failed: the sentence"),
    ]


def test_after_a_signal_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script: dict[str, list[list[Message]]] = {"gpm-seed0": [[("busy", "")]], "finetune-seed0": [[]]}
    pool = ScriptedPool(script, most=1)
    start: Callable[[Job], bool] = pool.start

    def interrupt(job: Job) -> bool:
        if not pool.started:
            signal.raise_signal(signal.SIGTERM)
        return start(job)

    monkeypatch.setattr(pool, "start", interrupt)
    with pytest.raises(InterruptedRun, match=re.escape("of 2 runs 2 not begun")) as stopped:
        carried_out(pool, tmp_path, Notes())
    assert (stopped.value.status, pool.stopped, pool.started) == (143, True, ["gpm-seed0"])
