"""Real processes that share a run: the numbers of one process, one writer, and an end with a sentence if one dies.

The processes are forked from one that has imported PyTorch, once for the whole file, and meet as those of torchrun do.
"""

import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.backend import timeout_asked_for
from adapters.cli.main import main
from adapters.torch.learner import TorchLearner
from adapters.torch.processes import TorchProcesses
from adapters.torch.run import BACKEND
from became_core import BecameError
from tests.processes import LIMIT, ended, lines, result, started, until
from tests.streams import prototype_stream
from tests.torch.torchrun_processes import command, compare

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

END = 120  # seconds after which no process may be left when one has died; each may wait 60 for another
# `nox -s stress` kills twenty.
KILLS = int(os.environ.get("BECAME_KILLS", "3"))
EPOCHS = 6
WORDS = "--preset quick --methods became --epochs 2 --stage2-epochs 1 --batch-size 25 --first 2 --curvature-samples 100"


@contextmanager
def commanded(folder: Path, words: list[list[str]], timeout: float = 60.0) -> Iterator[list[Any]]:
    """Processes that run a command, each with its own words; they meet at a store of this process, as at torchrun's."""
    folder.mkdir(exist_ok=True)
    distributed: Any = torch.distributed  # whose types lack the store
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with started(partial(_commanded, words, store.port, str(folder / "log"), timeout), len(words)) as processes:
        yield processes


def _commanded(words: list[list[str]], port: int, log: str, timeout: float, rank: int) -> None:
    command(rank, len(words), port, words[rank], log, timeout)


def said(folder: Path, rank: int, where: str = "err") -> str:
    return (folder / f"log.{rank}.{where}").read_text(encoding="utf-8")


def words_for(out: Path) -> list[str]:
    return [*WORDS.split(), "--out", str(out)]


def events(out: Path) -> int:
    return lines(out / "became-seed0" / "events.jsonl")


def check_result(out: Path, expected: dict[str, Any]) -> None:
    """In single precision; a rounding may move an image or two to another class."""
    found = result(out, "became-seed0")
    assert found["epochs"] == expected["epochs"]
    assert found["alpha"][1:] == pytest.approx(expected["alpha"][1:], abs=1e-3)
    for row, wanted in zip(found["accuracy"], expected["accuracy"], strict=True):
        assert row == pytest.approx(wanted, abs=1.0)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert main(BACKEND, words_for(out)) == 0
    return result(out, "became-seed0")


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """To 1e-9 in double precision: losses, alpha, accuracies and weights of every kind of method and network."""
    with started(partial(compare, folder=str(tmp_path))) as processes:
        assert ended(processes) == [0, 0]
    for rank in (0, 1):
        failures = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert failures == {}, "\n".join(f"{name}:\n{text}" for name, text in failures.items())


def test_the_first_process_alone_writes_and_prints(tmp_path: Path, expected: dict[str, Any]) -> None:
    out = tmp_path / "out"
    with commanded(tmp_path, [words_for(out)] * 2) as processes:
        assert ended(processes) == [0, 0]
    check_result(out, expected)
    assert events(out) > EPOCHS
    assert "task 2/2 learned" in said(tmp_path, 0, "out")
    assert said(tmp_path, 1, "out") == said(tmp_path, 1, "err") == said(tmp_path, 0, "err") == ""


@pytest.mark.timeout(300 + int(LIMIT) * KILLS)
def test_a_process_that_dies_ends_all_and_another_number_goes_on(tmp_path: Path, expected: dict[str, Any]) -> None:
    draw, out = random.Random(KILLS), tmp_path / "out"
    for kill in range(KILLS):
        if (out / "became-seed0" / "results.json").exists():
            check_result(out, expected)
            out = tmp_path / f"out-{kill}"
        folder, count, enough = tmp_path / f"kill-{kill}", 2 + kill % 2, events(out) + draw.randint(1, 3)
        with commanded(folder, [words_for(out)] * count) as processes:
            until(lambda: events(out) >= enough or not all(process.is_alive() for process in processes))  # noqa: B023
            time.sleep(draw.uniform(0, 0.1))
            victim = draw.randrange(count)
            processes[victim].kill()
            statuses = ended(processes, END)
        assert None not in statuses, "a process is left"
        if 0 in statuses and statuses[0] in (0, -signal.SIGKILL):
            continue  # it came as the run had ended
        errors = "".join(said(folder, rank) for rank in range(count) if rank != victim)
        # The others wait for a sum, or for what is to be done next.
        sentence = r"one of the \d processes ended, or did not answer within 60 seconds; all have stopped"
        assert len(re.findall(sentence, errors)) == 1, errors
        assert "Traceback" not in errors
    assert main(BACKEND, words_for(out)) == 0
    check_result(out, expected)


def test_the_others_know_whether_the_first_process_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wait for the sum of one of them, and can say why only once that one has ended."""
    monkeypatch.setattr("adapters.torch.processes.BEAT", 0.2)
    distributed: Any = torch.distributed  # whose types lack the store
    store = distributed.HashStore()
    first, second = (TorchProcesses(BACKEND, rank, count=3, store=store) for rank in (0, 1))
    assert not second.is_first_alive()
    first.beat()
    assert second.is_first_alive()
    first.tell_why()
    assert not second.is_first_alive()
    assert second.is_told()


def test_a_process_that_stalls_ends_all_after_the_time_out(tmp_path: Path, expected: dict[str, Any]) -> None:
    out = tmp_path / "out"
    with commanded(tmp_path, [words_for(out)] * 2, timeout=10.0) as processes:
        until(lambda: events(out) >= 2 or not processes[0].is_alive())
        assert processes[0].is_alive()
        assert processes[1].is_alive()
        os.kill(processes[1].pid, signal.SIGSTOP)
        assert ended(processes[:1], END) == [2]
    assert "one of the 2 processes ended, or did not answer within 10 seconds; all have stopped" in said(tmp_path, 0)
    assert (out / "became-seed0" / "config.json").exists()
    assert main(BACKEND, words_for(out)) == 0
    check_result(out, expected)


def test_unlike_commands_are_refused(tmp_path: Path) -> None:
    words = [words_for(tmp_path / "out"), [*words_for(tmp_path / "out"), "--lr", "0.2"]]
    with commanded(tmp_path, words) as processes:
        assert ended(processes) == [2, 2]
    assert "error: process 2 of 2 has command '" in said(tmp_path, 0)
    assert "--lr 0.2', and process 1 has '" in said(tmp_path, 0)
    assert not (tmp_path / "out").exists()


def test_a_signal_stops_all_after_the_epoch(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with commanded(tmp_path, [words_for(out)] * 2) as processes:
        until(lambda: events(out) >= 2 or not processes[0].is_alive())
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
        first, second = ended(processes, END)
    assert first == 128 + signal.SIGTERM
    assert second is not None
    assert "the same command goes on from there" in said(tmp_path, 0)
    assert said(tmp_path, 1) == ""


@pytest.mark.parametrize(
    ("device", "masks", "message"),
    [("cpu", "framework", "for the whole batch by NumPy"), ("cuda:1", "numpy", "cannot all have the device 'cuda:1'")],
)
def test_what_processes_cannot_share_is_refused(device: str, masks: str, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        TorchProcesses(BACKEND, 0, 2).learner("mlp", prototype_stream(), device, 0, dropout_masks=masks)


def test_a_module_of_ones_own_is_refused() -> None:
    learner = TorchLearner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4)), prototype_stream())
    with pytest.raises(BecameError, match="described networks alone"):
        learner.check_divisible()


@pytest.mark.parametrize("text", ["soon", "0", "nan"])
def test_a_time_out_is_a_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BECAME_TIMEOUT", text)
    with pytest.raises(BecameError, match=f"BECAME_TIMEOUT is '{text}'"):
        timeout_asked_for()
