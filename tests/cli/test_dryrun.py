"""A dry run: the steps it counts are those that a run takes, and it leaves nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters.cli.dryrun import steps
from adapters.cli.main import main
from adapters.torch.run import BACKEND
from became_core.continual import Annealed, Batch, Patience, Trained, Training, build_method, learn
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
    arguments = ["--dry-run", "--methods", "became", "gpm", "--seeds", "0", "1", "--validation", "0"]
    assert main(BACKEND, arguments) == 0
    shown = capsys.readouterr().out
    assert '"benchmark": "split-mnist"' in shown
    assert '"batch_size": 10' in shown
    assert "89,400 parameters: 88,400 shared, 1,000 in 5 heads" in shown  # 784 · 100 + 100 · 100, 5 · 2 · 100
    rows = {row[0]: row[1] for line in shown.splitlines() if len(row := line.replace("│", " ").split()) > 2}
    an_epoch = 80  # 800 images a task
    assert rows["became"] == f"{2 * 5 * 12 * an_epoch:,}"
    assert rows["gpm"] == f"{2 * 5 * 8 * an_epoch:,}"
    assert rows["all"] == f"{2 * 5 * 20 * an_epoch:,}"
    assert list(tmp_path.iterdir()) == []


def test_a_published_schedule_is_an_upper_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BACKEND, ["--dry-run", "--preset", "paper", "--methods", "gpm"]) == 0
    assert "at most" in capsys.readouterr().out


def test_what_is_wrong_is_said_before_any_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BACKEND, ["--dry-run", "--network", "perceptron"]) == 2
    assert "there is no network 'perceptron'" in capsys.readouterr().err
