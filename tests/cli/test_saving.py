"""When a run is saved: after every epoch; with --save-every at the ends of stages, after a signal, and else seldom."""

import os
import signal
from pathlib import Path

import pytest

from adapters.cli.main import main
from adapters.runs.checkpoints import Checkpoints
from adapters.runs.events import Events
from adapters.torch.run import BACKEND
from became_core.continual import EpochEnd, RunRecord, RunState

OPTIONS = ["--first", "2", "--methods", "finetune", "--epochs", "3", "--batch-size", "64", "--quiet"]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs that were done at each saving, with 1 for each task that was."""
    numbers: list[int] = []
    save = Checkpoints.save

    def recorded(self: Checkpoints, state: RunState) -> None:
        save(self, state)
        numbers.append(state.epochs + state.task)

    monkeypatch.setattr(Checkpoints, "save", recorded)
    return numbers


def test_a_run_is_saved_after_every_epoch_and_task(saved: list[int], tmp_path: Path) -> None:
    assert main(BACKEND, [*OPTIONS, "--out", str(tmp_path)]) == 0
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8]


def test_it_is_saved_less_often_but_for_the_ends_of_stages(saved: list[int], tmp_path: Path) -> None:
    assert main(BACKEND, [*OPTIONS, "--save-every", "1000", "--out", str(tmp_path)]) == 0
    assert saved == [1, 3, 4, 7, 8]


def test_a_signal_saves_it_in_any_case(saved: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_epoch_end, sent = Events.on_epoch_end, list[int]()

    def interrupted(self: Events, event: EpochEnd) -> None:
        on_epoch_end(self, event)
        if event.epoch == 2 and not sent:
            sent.append(event.epoch)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Events, "on_epoch_end", interrupted)
    assert main(BACKEND, [*OPTIONS, "--save-every", "1000", "--out", str(tmp_path)]) == 128 + signal.SIGTERM
    assert saved == [1, 2]


def test_a_signal_as_the_last_run_ends_leaves_it_in_the_summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_run_end, sent = Events.on_run_end, list[RunRecord]()

    def interrupted(self: Events, record: RunRecord) -> None:
        on_run_end(self, record)
        if not sent:
            sent.append(record)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Events, "on_run_end", interrupted)
    assert main(BACKEND, [*OPTIONS, "--out", str(tmp_path)]) == 128 + signal.SIGTERM
    assert (tmp_path / "finetune-seed0" / "results.json").exists()
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 2
