"""Runs on a Dask cluster of real processes: workers, the scheduler and the command end, and nothing is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.cli.jobs import Job, requested_jobs
from adapters.cli.main import main
from adapters.cli.options import Request
from adapters.cli.worker import order_of
from adapters.torch.run import BACKEND
from tests.processes import WAIT, lines, result, until

pytest.importorskip("distributed", reason="Dask's distributed is not installed; the extra dask has it")

from adapters.cli import cluster
from adapters.runs import cluster as connecting

RUN = ["--preset", "quick", "--methods", "gpm", "--epochs", "20", "--batch-size", "50", "--first", "2"]
KILLS = int(os.environ.get("BECAME_KILLS", "3"))
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process of Dask; all that were started are ended after the test."""
    with ExitStack() as processes:

        def start(*words: str) -> subprocess.Popen[bytes]:
            arguments = [sys.executable, "-m", *words, "--no-dashboard"]
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            processes.callback(process.wait)
            processes.callback(process.kill)
            return process

        yield start


@pytest.fixture
def scheduler(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, subprocess.Popen[bytes]]:
    """The address of a scheduler, and its process, which chooses a free port and writes the address to a file."""
    file = tmp_path_factory.mktemp("scheduler") / "scheduler.json"
    process = start(
        *("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
    )
    until(lambda: file.exists() and file.read_text(encoding="utf-8").endswith("}"))
    return json.loads(file.read_text(encoding="utf-8"))["address"], process


def add_worker(start: Start, address: str) -> None:
    start("distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny")


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.timeout(120 + WAIT * KILLS)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc says whose child a process is")
def test_a_killed_workers_run_goes_on_elsewhere_and_ends_with_the_same_bits(
    start: Start, scheduler: tuple[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address, _ = scheduler
    assert main(BACKEND, [*RUN, "--quiet", "--out", str(tmp_path / "one")]) == 0
    add_worker(start, address)
    draw, kills = random.Random(KILLS), 0
    while kills < KILLS:
        run = tmp_path / f"after-{kills}" / "gpm-seed0"
        planned = min(3, KILLS - kills)  # the scheduler gives up a run with which four workers died
        struck: list[int] = []

        def strike(run: Path = run, planned: int = planned, struck: list[int] = struck) -> None:
            log, ends = run / "events.jsonl", run / "results.json"
            for _ in range(planned):
                before, heard = lines(log), draw.randint(2, 4)
                until(lambda: lines(log) >= before + heard or ends.exists())  # noqa: B023 # it is called at once
                time.sleep(draw.uniform(0, 0.1))
                try:
                    worker = parent_of(int((run / "lock").read_text()))
                except (OSError, ValueError):  # beside busy processes, the run may have ended meanwhile
                    return
                add_worker(start, address)
                os.kill(worker, signal.SIGKILL)
                struck.append(worker)

        striker = threading.Thread(target=strike)
        striker.start()
        assert main(BACKEND, [*RUN, "--scheduler", address, "--out", str(run.parent)]) == 0
        striker.join(WAIT)
        kills += planned
        assert result(run.parent, run.name) == result(tmp_path / "one", run.name)
        assert {path.name for path in run.parent.iterdir()} == {run.name, "summary.csv"}
        said = capfd.readouterr()
        # The last one may have come as the run ended.
        assert len(struck) - 1 <= said.out.count("goes on after task ") <= len(struck)
        assert "Traceback" not in said.err


def test_ctrl_c_saves_what_has_begun_and_takes_back_the_rest(
    start: Start, scheduler: tuple[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address, _ = scheduler
    add_worker(start, address)
    log = tmp_path / "gpm-seed0" / "events.jsonl"

    def press() -> None:
        until(lambda: lines(log) > 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    long = [*RUN, "--seeds", "0", "1", "--epochs", "3000", "--out", str(tmp_path)]
    assert main(BACKEND, [*long, "--scheduler", address]) == 130
    said = capfd.readouterr().err
    assert "stopped: of 2 runs 1 saved on the way, 1 not begun; the same command goes on from there." in said
    (last,) = sorted((log.parent / "checkpoints").glob("*.json"))[-1:]
    assert int(last.stem) == log.read_text().count('"epoch", "time"')
    assert not (log.parent / "lock").exists()
    assert not list(tmp_path.glob(".became-*"))


def test_a_scheduler_that_is_missing_or_ends_is_one_sentence(
    scheduler: tuple[str, subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    address, process = scheduler

    def end() -> None:
        until(lambda: list(tmp_path.glob(".became-*")))  # the command has connected
        process.kill()

    threading.Thread(target=end).start()
    assert main(BACKEND, [*RUN, "--scheduler", address, "--out", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert f"warning: the scheduler at {address} has no workers yet; the runs wait for one.\n" in said
    assert f"error: the scheduler at {address} is gone; each run is saved after its last whole epoch, and" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob(".became-*"))
    process.wait()
    monkeypatch.setattr(connecting, "CONNECT", 0.5)
    assert main(BACKEND, [*RUN, "--scheduler", address, "--out", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert f"error: no scheduler answers at {address} (" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "content", ["", '{"type":', "task,x\na,1\n", "[1]", "{}", '{"address": 1}', '{"address": ""}', "\xff"]
)
def test_a_file_that_is_no_schedulers_is_one_sentence(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scheduler.json"
    file.write_bytes(content.encode("latin-1"))
    assert main(BACKEND, [*RUN, "--scheduler", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: {file} is no scheduler's file; give the one that 'dask scheduler --scheduler-file FILE' has written.\n"
    )


def test_the_address_is_found_in_a_schedulers_file(scheduler: tuple[str, Any], tmp_path: Path) -> None:
    address, _ = scheduler
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": address}), encoding="utf-8")
    with connecting.connected(str(file)) as client:
        assert client.scheduler.address == address


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": "0.0.1"}, "the worker tcp://host:1 has version .* of this package, not 0.0.1; install the same."),
        ({"mark": "/nowhere/mark"}, "the worker tcp://host:1 does not see .*; all must share the disk of --out."),
    ],
)
def test_a_worker_that_cannot_do_its_part_says_why(
    changed: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = SimpleNamespace(address="tcp://host:1")
    monkeypatch.setattr(cluster, "get_worker", lambda: worker)
    (job,) = requested_jobs(Request(methods=("gpm",), out=tmp_path), lambda: BACKEND)
    assert isinstance(job, Job)
    order = {**order_of(job), "mark": str(tmp_path), "topic": "topic", "slots": {}}
    kind, text = cluster.carry_out("gpm-seed0", {**order, **changed})
    assert kind == "failed"
    assert re.fullmatch(message, text)
