"""A dry run: the steps it counts are those that a run takes, and it leaves nothing."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.cli.dryrun import Plan, estimated, steps
from adapters.cli.main import main
from adapters.torch.run import BACKEND
from became_core.continual import (
    Annealed,
    Batch,
    Patience,
    Trained,
    Training,
    build_method,
    learn,
    run_context,
)
from became_core.continual.data import Indices
from became_core.curvature import Pushforward, Taps
from reference.learner import ReferenceLearner
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=3, validation=0.1)


class Counting(ReferenceLearner):
    """It counts the batches it is trained on."""

    taken = 0

    def train(self, batches: Sequence[Batch], *arguments: Any) -> Trained:
        self.taken += len(batches)
        return super().train(batches, *arguments)


@pytest.mark.parametrize("name", ["finetune", "joint", "gpm", "became", "ewc", "became+trgp"])
@pytest.mark.parametrize("batch_size", [8, 16, 1000])
def test_the_steps_counted_are_those_taken(name: str, batch_size: int) -> None:
    training = Training(Annealed(0.01, 3), Annealed(0.01, 2), batch_size=batch_size)
    method = build_method(name)
    learner = Counting(STREAM)
    learn(learner, STREAM, method, training)
    assert steps(method, STREAM, training) == learner.taken


@pytest.mark.parametrize("name", ["gpm", "became"])
def test_a_schedule_that_ends_by_itself_takes_no_more_steps(name: str) -> None:
    schedule = Patience(0.01, patience=1, epochs=5)
    training = Training(schedule, schedule, batch_size=16)
    method = build_method(name)
    learner = Counting(STREAM)
    learn(learner, STREAM, method, training)
    assert 0 < learner.taken <= steps(method, STREAM, training)


def test_it_says_what_would_be_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "quick", "--methods", "became", "gpm", "--seeds", "0", "1", "--validation", "0"]
    assert main(BACKEND, [*arguments, "--dry-run", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("became") < shown.index('"benchmark": "split-mnist"')  # the table comes first
    assert '"batch_size": 10' in shown
    assert "89,400 parameters: 88,400 shared, 1,000 in 5 heads" in shown  # 784 · 100 + 100 · 100, 5 · 2 · 100
    rows = {row[0]: row[1] for line in shown.splitlines() if len(row := line.split()) > 2}
    an_epoch = 80  # 800 images a task
    assert rows["became"] == f"{2 * 5 * 12 * an_epoch:,}"
    assert rows["gpm"] == f"{2 * 5 * 8 * an_epoch:,}"
    assert rows["all"] == f"{2 * 5 * 20 * an_epoch:,}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--single-head"], "88,600 parameters: 88,600 shared\n"),  # 784 · 100 + 100 · 100 + 2 · 100
        (["--first", "1"], "88,600 parameters: 88,400 shared, 200 in 1 head\n"),
    ],
)
def test_it_counts_the_heads_that_there_are(option: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BACKEND, ["--preset", "quick", "--methods", "finetune", "--epochs", "1", *option, "--dry-run"]) == 0
    assert said in capsys.readouterr().out


def test_a_published_schedule_is_an_upper_bound(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--benchmark", "split-mnist", "--preset", "paper", "--methods", "gpm"]
    assert main(BACKEND, ["--dry-run", *arguments]) == 0
    assert "At most" in capsys.readouterr().out


def test_quietly_there_is_the_table_alone_and_the_configuration_only_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--preset", "quick", "--methods", "gpm", "--epochs", "1", "--first", "2"]
    assert main(BACKEND, [*arguments, "--dry-run", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "parameters" not in shown
    assert "{" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main(BACKEND, [*arguments, "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["threshold"] == 0.95


class Clocked(ReferenceLearner):
    """A learner that takes a known time for each step and each sample, and a clock that shows it and nothing else."""

    now = 0.0

    def train(self, batches: Sequence[Batch], *arguments: Any) -> Trained:
        Clocked.now += sum(0.002 + 0.0002 * len(batch.indices) for batch in batches)
        return super().train(batches, *arguments)

    def logits(self, indices: Indices, *arguments: Any, **options: Any) -> Any:
        Clocked.now += 0.0001 * len(indices)
        return super().logits(indices, *arguments, **options)

    def taps(self, task: int, indices: Indices, *arguments: Any, **options: Any) -> Iterator[Taps]:
        Clocked.now += 0.0005 * len(indices)
        return super().taps(task, indices, *arguments, **options)

    def pushforward(self, task: int, indices: Indices, *arguments: Any) -> Iterator[Pushforward]:
        Clocked.now += 0.0003 * len(indices)
        return super().pushforward(task, indices, *arguments)


@pytest.mark.parametrize("name", ["gpm", "became", "ewc", "trgp", "hat", "packnet"])
def test_the_time_is_that_of_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured on a fifth of the samples, three of five tasks and three of twelve epochs."""
    monkeypatch.setattr(run_context, "time", SimpleNamespace(perf_counter=lambda: Clocked.now))
    stream = prototype_stream(tasks=5, per_class=200)
    training = Training(Annealed(0.01, 12), Annealed(0.01, 6), batch_size=10)
    method = build_method(name)
    estimate = estimated(lambda: Clocked(stream), stream, method, training)
    seconds = learn(Clocked(stream), stream, method, training).seconds
    real = {
        "training": seconds["stage1"] + seconds.get("stage2", 0.0),
        "memory": seconds["memory"],
        "merging": seconds.get("merge", 0.0),
        "evaluation": seconds["evaluation"],
    }
    assert estimate == pytest.approx(real, rel=0.02)
    assert real["training"] > 0
    assert real["evaluation"] > 0


def test_what_is_wrong_is_said_before_any_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BACKEND, ["--dry-run", "--network", "perceptron"]) == 2
    assert "there is no network 'perceptron'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workers", "threads", "cores", "elapsed"),
    [
        (1, 1, 8, 2 * (3 + 2 + 1)),
        (2, 1, 8, 6.0),
        (3, 1, 8, 4.0),
        (6, 1, 8, 3.0),
        (9, 1, 8, 3.0),  # there is nothing for the others to do
        (6, 2, 8, 4.5),  # twelve threads on eight cores
        (9, 2, 8, 4.5),
        (1, 8, 4, 2 * (3 + 2 + 1) * 2),
    ],
)
def test_workers_share_the_runs_and_the_cores(
    workers: int, threads: int, cores: int, elapsed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three methods of two seeds, whose runs take 3, 2 and 1 seconds."""
    monkeypatch.setattr("adapters.cli.dryrun.available_threads", lambda: cores)
    times = {name: {"training": 2.0 * seconds} for name, seconds in {"a": 3, "b": 2, "c": 1}.items()}
    alone = Plan({}, {}, 1, 1, 1, {}, times, bounded=False, seeds=2, elapsed=12.0)
    plan = alone.with_workers(workers, threads)
    assert (plan.workers, plan.threads) == (workers, threads)
    assert plan.elapsed == pytest.approx(elapsed)


def test_a_dry_run_with_workers_says_how_long_all_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "quick", "--methods", "gpm", "--seeds", "0", "1", "--first", "2", "--epochs", "1"]
    assert main(BACKEND, [*words, "--dry-run", "--workers", "2", "--threads", "1", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"with 2 workers of 1 thread each: about [\d.]+ \w+ from the beginning to the end", said)
    assert not (tmp_path / "out").exists()
