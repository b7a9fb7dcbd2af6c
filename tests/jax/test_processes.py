"""Real processes that share a run in JAX: the numbers of one process, one writer, an end with a sentence if one dies.

That devices of a mesh learn what one learns is in ``test_mesh.py``: a mesh of several processes compiles the same.
"""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.cli.main import main
from adapters.jax.processes import JaxProcesses
from adapters.jax.run import BACKEND
from became_core import BecameError
from tests.processes import LIMIT, lines, result, until
from tests.streams import prototype_stream

END = 120  # seconds after which no process may be left when one has died; each may wait 60 for another
# `nox -s stress` kills twenty.
KILLS = int(os.environ.get("BECAME_KILLS", "1"))
WORDS = "--preset quick --methods ewc --epochs 1 --batch-size 50 --first 2 --curvature-samples 50"


def words_for(out: Path) -> list[str]:
    return [*WORDS.split(), "--out", str(out)]


def events(out: Path) -> int:
    return lines(out / "ewc-seed0" / "events.jsonl")


@contextmanager
def commanded(folder: Path, words: list[str], module: str = "adapters.jax.run", **settings: str) -> Iterator[list[Any]]:
    """Two processes that run a module; what they print goes into files beside each other. None is left afterwards."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    settings |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    settings |= {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
    settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with ExitStack() as stack:
        processes = []
        for rank in (0, 1):
            out, err = (
                stack.enter_context((folder / f"{rank}.{name}").open("w", encoding="utf-8")) for name in ("out", "err")
            )
            command, own = [sys.executable, "-m", module, *words], {"JAX_PROCESS_ID": str(rank)}
            processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | settings | own))
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def said(folder: Path, rank: int, where: str = "err") -> str:
    """What a process has printed, without gloo's greeting."""
    text = (folder / f"{rank}.{where}").read_text(encoding="utf-8")
    return "".join(line for line in text.splitlines(keepends=True) if "[Gloo]" not in line)


@pytest.mark.timeout(300 + int(LIMIT) * KILLS)
def test_two_processes_learn_what_one_learns_and_go_on_after_a_death(tmp_path: Path) -> None:
    draw, out, folder = random.Random(KILLS), tmp_path / "out", tmp_path / "whole"
    for kill in range(KILLS):
        if (out / "ewc-seed0" / "results.json").exists():
            out = tmp_path / f"out-{kill}"
        enough, victim, place = events(out) + 1, kill % 2, tmp_path / f"kill-{kill}"
        with commanded(place, words_for(out)) as processes:
            until(lambda: events(out) >= enough or any(process.poll() is not None for process in processes))  # noqa: B023
            time.sleep(draw.uniform(0, 0.1))
            processes[victim].kill()
            status = processes[1 - victim].wait(END)
        until(lambda: status == 0 or "ended" in said(place, victim))  # noqa: B023 - by the shell that outlives it
        if status == 0:
            continue  # it came as the run had ended
        for rank in (0, 1):
            assert "one of the 2 processes ended, or did not answer within 60 seconds; all have stopped" in said(
                place, rank
            )
            assert "Traceback" not in said(place, rank)
    with commanded(folder, words_for(out)) as processes:
        assert [process.wait(LIMIT) for process in processes] == [0, 0]
    assert "task 2/2 learned" in said(folder, 0, "out")
    assert said(folder, 1, "out") == said(folder, 1) == said(folder, 0) == ""
    assert main(BACKEND, words_for(tmp_path / "alone")) == 0
    found, expected = (result(of, "ewc-seed0") for of in (out, tmp_path / "alone"))
    assert found["epochs"] == expected["epochs"]
    for row, wanted in zip(found["accuracy"], expected["accuracy"], strict=True):
        assert row == pytest.approx(wanted, abs=1.0)  # in single precision


def test_the_functions_around_a_loop_give_in_two_processes_what_they_give_in_one(tmp_path: Path) -> None:
    with commanded(tmp_path / "two", [str(tmp_path)], "tests.jax.sharded_devices") as processes:
        statuses = [process.wait(LIMIT) for process in processes]
    assert statuses == [0, 0], said(tmp_path / "two", 0)


def test_what_the_first_process_refuses_ends_the_others_in_silence(tmp_path: Path) -> None:
    """JAX aborted them, with a report of its own."""
    folder = tmp_path / "refused"
    with commanded(folder, [*words_for(tmp_path / "out"), "--device", "cpu:all"]) as processes:
        assert [process.wait(LIMIT) for process in processes] == [2, 0]
    assert said(folder, 0) == "error: several processes share all devices of a kind; give cpu in place of 'cpu:all'.\n"
    assert said(folder, 1) == said(folder, 1, "out") == ""


def test_processes_without_numbers_are_refused() -> None:
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_PROCESS_ID": "0", "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-m", "adapters.jax.run"], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: JAX cannot connect the processes (Number of processes must be defined)")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("device", ["cpu:0", "cpu:all"])
def test_processes_have_all_devices_of_a_kind(device: str) -> None:
    with pytest.raises(BecameError, match=f"give cpu in place of '{device}'"):
        JaxProcesses(BACKEND, 0, 2).learner("mlp", prototype_stream(), device, 0)
