"""A merge that is shared out over a Dask cluster: equal bytes, whoever is killed; and each fault is a sentence."""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("distributed", reason="Dask's distributed is not installed; the extra dask has it")
pytest.importorskip("tyro")

from distributed import Client

from adapters.checkpoints import MergePlan, cluster, executors, merge_checkpoints
from adapters.checkpoints.job import Job
from adapters.checkpoints.opening import open_job
from adapters.checkpoints.write import file_states
from adapters.cli.__main__ import main
from adapters.runs import cluster as connecting
from became_core import BecameError
from tests.checkpoints.dask_processes import scheduler, worker
from tests.checkpoints.killed import plan_in
from tests.checkpoints.models import arrays, contents, pair, saved
from tests.checkpoints.test_kronecker import models as with_factors
from tests.checkpoints.test_lora import adapter
from tests.checkpoints.test_resume import MODULES, SHAPES, killed_after
from tests.processes import WAIT, until

KILLS = int(os.environ.get("BECAME_KILLS", "2"))


@dataclass
class Dask:
    """A cluster of two workers.

    Attributes:
        file: its scheduler's.
        client: of the tests' own.
        processes: those of the workers.
        running: what ends all of them.
    """

    file: Path
    client: Client
    processes: list[BaseProcess]
    running: ExitStack

    def complete(self) -> None:
        """Replace workers that were killed."""
        alive = [process for process in self.processes if process.is_alive()]
        new = [self.running.enter_context(worker(self.file, self.client)) for _ in range(2 - len(alive))]
        self.processes = [*alive, *new]


@pytest.fixture(scope="module")
def cluster_of_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    file = tmp_path_factory.mktemp("scheduler") / "scheduler.json"
    with ExitStack() as running:
        running.enter_context(scheduler(file))
        client = running.enter_context(Client(scheduler_file=str(file), set_as_default=False))
        yield Dask(file, client, [], running)


@pytest.fixture
def dask(cluster_of_processes: Dask, monkeypatch: pytest.MonkeyPatch) -> Dask:
    """The cluster, both of whose workers are there; a merge has many parts, of a few blocks each."""
    monkeypatch.setattr(cluster, "PART", 100_000)
    cluster_of_processes.complete()
    return cluster_of_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for k, name in enumerate("AB"):
        saved(place, name, arrays(k, SHAPES))
        saved(place, f"F{name}", arrays(10 + k, SHAPES, positive=True))
    merge_checkpoints(plan_in(place), place / "whole")
    return place


def adapters_of(folder: Path) -> MergePlan:
    for k, name in enumerate("AB"):
        adapter(folder, name, k, rank=3, modules=MODULES)
        shapes = {f"{module}.weight": shape for module, shape in MODULES.items()}
        saved(folder, f"F{name}", arrays(10 + k, shapes, positive=True))
    return plan_in(folder)


@pytest.mark.parametrize("what", ["linear", "model", "layer", "weight", "factors", "adapters"])
def test_the_bytes_are_those_of_one_process(
    what: str, folder: Path, dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_in(folder)
    if what == "linear":
        models = tuple(model.model for model in plan.models)
        plan = MergePlan(models, "linear", shard_size=10**6)  # type: ignore[arg-type] # paths stand for models
    elif what in ("factors", "adapters"):
        plan = adapters_of(tmp_path) if what == "adapters" else MergePlan(with_factors(tmp_path, "A", "B"))
    else:
        plan = plan.replaced(per=what)
    alone = merge_checkpoints(plan, tmp_path / "alone")
    for owner, name in ((Job, "measure"), (executors, "written")):  # the command does nothing of it itself
        monkeypatch.delattr(owner, name)
    shared = merge_checkpoints(plan, tmp_path / "shared", scheduler=str(dask.file))
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert shared.coefficients == alone.coefficients
    assert not list(tmp_path.glob(".*"))


@contextmanager
def struck(dask: Dask, name: str, monkeypatch: pytest.MonkeyPatch, wait: float | None = None) -> Iterator[None]:
    """Kill a worker in the pass of this name: once it alone has parts that are left, or after some seconds."""
    victim = dask.processes[0]
    processes = dask.client.run(os.getpid)
    (address,) = (worker for worker, process in processes.items() if process == victim.pid)
    (other,) = processes.keys() - {address}

    def has_the_rest() -> bool:
        at_work = dask.client.processing()
        return bool(at_work[address]) and not at_work[other]

    def kill() -> None:
        if wait is None:
            until(has_the_rest)
        else:
            time.sleep(wait)
        victim.kill()

    usual, striker = getattr(cluster.Cluster, name), threading.Thread(target=kill)

    def strike(*arguments: Any) -> Any:
        if wait is None:
            os.kill(processes[address], signal.SIGSTOP)  # so that it ends none of its parts
        striker.start()
        return usual(*arguments)

    monkeypatch.setattr(cluster.Cluster, name, strike)
    yield
    striker.join(WAIT)
    victim.join(WAIT)
    assert victim.exitcode == -signal.SIGKILL


@pytest.mark.timeout(120 + WAIT * KILLS)
@pytest.mark.parametrize("number", range(KILLS))
def test_what_a_killed_worker_had_is_done_elsewhere(
    number: int, folder: Path, dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = random.Random(number).uniform(0, 0.3) if number > 1 else None
    with struck(dask, ("measure", "write")[number % 2], monkeypatch, wait):
        merge_checkpoints(plan_in(folder), tmp_path / "out", scheduler=str(dask.file))
    assert contents(tmp_path / "out") == contents(folder / "whole")


def test_a_killed_command_goes_on_with_or_without_the_cluster(folder: Path, dask: Dask, tmp_path: Path) -> None:
    measured = len(SHAPES)  # lines
    killed_after(measured + 5, folder, tmp_path / "shared first", str(dask.file))
    killed_after(measured // 2, folder, tmp_path / "alone first")
    begun = {}
    for first, then in (("shared", None), ("alone", str(dask.file))):
        out, said = tmp_path / f"{first} first", list[tuple[str, int]]()
        assert not out.exists()
        merge_checkpoints(plan_in(folder), out, scheduler=then, progress=lambda *state: said.append(state[:2]))  # noqa: B023
        assert contents(out) == contents(folder / "whole")
        begun[first] = said[0]
    assert begun["shared"][0] == "writing"
    assert begun["shared"][1] > SHAPES["model.layers.0.weight"][1]
    assert begun["alone"][0] == "measuring"
    assert begun["alone"][1] > 40 * 1000
    assert not list(tmp_path.glob(".*"))


SHARE = "all must share the disk of the models and of the result"
FAULTS = {
    "missing": rf"^the worker tcp://.* does not see /nowhere/model; {SHARE}\.$",
    "other": rf"^the worker tcp://.* sees another .*B\.safetensors than the command does \(\d+ bytes; .*{SHARE}\.$",
    "out": rf"^the worker tcp://.* does not see .*\.out\.merging; {SHARE}\.$",
    "killed": r"^a part of the merge failed: several workers died with it, one after another; what is done stays, and",
    "version": r"^the worker tcp://.* has version .* of this package, not 0\.0\.1; install the same\.$",
    "version of a newcomer": r"^the worker tcp://.* has version .* of this package, not 0\.0\.1; install the same\.$",
}


def allow_failures(count: int, dask_scheduler: Any) -> None:
    """Say on a scheduler how many workers may die with a task."""
    dask_scheduler.allowed_failures = count


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stops_a_merge_is_a_sentence_and_nothing_is_lost(
    fault: str, folder: Path, dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_in(folder)
    first, second, *others = file_states(open_job(plan))
    files = {"missing": ("/nowhere/model", *second[1:]), "other": (second[0], second[1] + 1, second[2])}
    with ExitStack() as until_repaired:
        patch = until_repaired.enter_context(monkeypatch.context())
        if fault in files:  # what the command sees, while its workers see what is there
            patch.setattr(cluster, "file_states", lambda _: [first, files[fault], *others])
        elif fault == "out":
            patch.setattr(cluster, "identity", lambda _: "of another merge")
        elif fault == "killed":
            dask.client.run_on_scheduler(allow_failures, 0)
            until_repaired.callback(dask.client.run_on_scheduler, allow_failures, 3)
            until_repaired.enter_context(struck(dask, "write", patch))
        else:
            patch.setattr(connecting if fault == "version" else cluster, "__version__", "0.0.1")
        with pytest.raises(BecameError, match=FAULTS[fault]):
            merge_checkpoints(plan, tmp_path / "out", scheduler=str(dask.file))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.merging").exists() == (fault != "version")  # which is seen before anything is done
    merge_checkpoints(plan, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder / "whole")


def test_what_a_worker_refuses_is_refused_as_in_one_process(dask: Dask, tmp_path: Path) -> None:
    plan, values = pair(tmp_path), arrays(0)
    values["model.layers.1.mlp.bias"][2] = np.nan
    saved(tmp_path, "A", values)
    with pytest.raises(BecameError, match=r"^'model.layers.1.mlp.bias' of .* has an entry that is infinite"):
        merge_checkpoints(plan, tmp_path / "out", scheduler=str(dask.file))
    assert not list(tmp_path.glob("*out*"))


def words(folder: Path, out: Path, scheduler: str) -> list[str]:
    models, fishers = ([str(folder / f"{kind}{n}.safetensors") for n in "AB"] for kind in ("", "F"))
    options = ["--per", "leaf", "--shard-size", "400KB", "--out", str(out), "--scheduler", scheduler]
    return ["merge", *models, "--fisher", *fishers, *options]


def test_a_scheduler_that_ends_or_is_missing_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "scheduler.json"
    journal = tmp_path / ".out.merging" / "journal.jsonl"
    with scheduler(file) as process:
        address = json.loads(file.read_text(encoding="utf-8"))["address"]

        def kill() -> None:
            until(journal.exists)
            process.kill()

        striker = threading.Thread(target=kill)
        striker.start()
        assert main(words(folder, out, str(file))) == 2
        striker.join(WAIT)
    said = capfd.readouterr().err
    assert f"warning: the scheduler at {file} has no workers yet; the merge waits for one.\n" in said
    assert (
        f"error: the scheduler at {file} is gone; what is done stays, and the same command goes on from there.\n"
        in said
    )
    monkeypatch.setattr(connecting, "CONNECT", 0.5)
    assert main(words(folder, out, address)) == 2
    said += capfd.readouterr().err
    assert f"error: no scheduler answers at {address} (" in said
    assert "Traceback" not in said
    assert journal.exists()
    assert not out.exists()


def test_without_dask_a_sentence_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapters.checkpoints.cluster", "adapters.runs.cluster"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dask", None)
    assert main(words(folder, tmp_path / "out", "tcp://x:1")) == 2
    assert capsys.readouterr().err == "error: the package 'dask' is missing; pip install 'became[dask]'.\n"
    assert list(tmp_path.iterdir()) == []
