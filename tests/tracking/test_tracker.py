"""What trackers are given of a run, whole or in parts, and the files and calls that it becomes."""

import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adapters.tracking import TRACKERS, Tracker, Writer, open_writer
from became_core import BecameError
from became_core.continual import (
    Annealed,
    Callback,
    Patience,
    RunRecord,
    RunState,
    Training,
    build_method,
    learn,
)
from became_core.continual.metrics import average_accuracy, backward_transfer
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=3, validation=0.1)
TRAINING = Training(Annealed(0.1, 2), Annealed(0.1, 1), batch_size=16)
CONFIGURATION = {"seed": 0, "schedule": "annealed", "lr": 0.1, "lr_steps": [0.0, 0.5], "first": None}
FLAT = {"seed": 0, "schedule": "annealed", "lr": 0.1, "lr_steps": "0.0 0.5"}


class Stopped(Exception):  # noqa: N818 # it is no error
    pass


class Written:
    """Keeps what a tracker writes."""

    def __init__(self) -> None:
        self.begun: list[tuple[dict[str, Any], int]] = []
        self.points: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def begin(self, hyperparameters: Mapping[str, str | int | float | bool], step: int) -> None:
        self.begun.append((dict(hyperparameters), step))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.points.append((step, dict(scalars)))

    def end(self) -> None:
        self.ended += 1


def run(writer: Writer, training: Training = TRAINING, *others: Callback, state: RunState | None = None) -> RunRecord:
    with Tracker(writer, CONFIGURATION) as tracker:
        method = build_method("became")
        learner = ReferenceLearner(STREAM)
        return learn(learner, STREAM, method, training, callbacks=[*others, tracker], state=state)


def in_parts(writer: Writer, count: int) -> None:
    """Stop whenever so many states are kept, before the tracker hears of the next, and go on from the last of them."""
    state: RunState | None = None
    while True:
        states: list[RunState] = []

        def keep(state: RunState, states: list[RunState] = states) -> None:
            if len(states) == count:
                raise Stopped
            states.append(state)

        try:
            run(writer, TRAINING, Listening(keep=keep), state=state)
        except Stopped:
            state = states[-1]
        else:
            return


def test_every_epoch_and_task_is_a_point() -> None:
    written = Written()
    record = run(written)
    assert written.begun == [(FLAT, 0)]
    assert written.ended == 1
    steps = [step for step, _ in written.points]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]  # a task's are at its last epoch's
    epochs = [scalars for _, scalars in written.points if "epoch/loss" in scalars]
    assert [set(each) for each in epochs] == [{"epoch/loss", "epoch/rate"}] * 9
    assert 0 < epochs[0]["epoch/loss"] < 5
    tasks = [scalars for _, scalars in written.points if "task/ACC" in scalars]
    for task, scalars in enumerate(tasks, start=1):
        so_far = record.accuracy[:task, :task]
        expected = {
            **{f"accuracy/task_{each + 1:02d}": record.accuracy[task - 1, each] for each in range(task)},
            **{f"loss/task_{each + 1:02d}": record.loss[task - 1, each] for each in range(task)},
            "task/ACC": average_accuracy(so_far),
            "task/BWT": backward_transfer(so_far),
            "task/class_incremental_ACC": average_accuracy(record.class_incremental_accuracy[:task, :task]),
        }
        if task > 1:
            expected["task/alpha"] = record.alpha[task - 1]
        assert scalars == expected


def test_a_validation_loss_is_tracked_where_there_is_one() -> None:
    written = Written()
    schedule = Patience(0.1, patience=1, epochs=2)
    run(written, Training(schedule, schedule, batch_size=16))
    assert "epoch/validation_loss" in written.points[0][1]


@pytest.mark.parametrize(("states", "epochs"), [(1, 1), (2, 2), (5, 4)])
def test_a_run_in_parts_has_the_points_of_the_run(states: int, epochs: int) -> None:
    whole, parts = Written(), Written()
    run(whole)
    in_parts(parts, states)
    assert [step for _, step in parts.begun][:2] == [0, epochs]
    assert parts.ended == len(parts.begun)
    assert parts.points == whole.points


def test_a_run_that_never_began_is_not_ended() -> None:
    written = Written()
    with pytest.raises(Stopped), Tracker(written, {}):
        raise Stopped
    assert written.ended == 0


@pytest.mark.parametrize("tracker", sorted(TRACKERS))
def test_a_missing_package_is_one_sentence(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"adapters.tracking.{tracker}", raising=False)
    monkeypatch.setitem(sys.modules, TRACKERS[tracker], None)  # so its import fails
    with pytest.raises(BecameError) as caught:
        open_writer(tracker, tmp_path)
    assert str(caught.value) == (
        f"the tracker {tracker} needs the package {TRACKERS[tracker]}; pip install 'became[{tracker}]'."
    )


def read_events(file: Path) -> list[Any]:
    """The events of a file: records of length, its checksum, content, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, events = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def scalars_of(folder: Path) -> list[tuple[int, str, float]]:
    """The scalars that TensorBoard shows of a folder: a later file's start takes back what is not before it."""
    shown: list[tuple[int, str, float]] = []
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda file: int(file.suffix[1:])):
        for event in read_events(file):
            if event.session_log.status == 1:
                shown = [point for point in shown if point[0] < event.step]
            values = event.summary.value
            shown += [(event.step, value.tag, value.simple_value) for value in values if value.HasField("simple_value")]
    return shown


def points_of(written: Written) -> list[tuple[int, str, float]]:
    return [(step, name, value) for step, scalars in written.points for name, value in scalars.items()]


def assert_points(found: list[tuple[int, str, float]], expected: list[tuple[int, str, float]]) -> None:
    assert [point[:2] for point in found] == [point[:2] for point in expected]
    assert [point[2] for point in found] == pytest.approx([point[2] for point in expected], rel=1e-6)  # it is float32


def test_tensorboards_file_has_the_scalars_and_the_hyperparameters(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    whole = Written()
    run(whole)
    run(open_writer("tensorboard", tmp_path))
    assert_points(scalars_of(tmp_path), points_of(whole))
    (file,) = tmp_path.iterdir()
    tags = [value.tag for event in read_events(file) for value in event.summary.value]
    assert "_hparams_/session_start_info" in tags
    assert b"lr_steps" in file.read_bytes()


def test_tensorboard_drops_what_is_after_the_state_that_a_run_goes_on_from(tmp_path: Path) -> None:
    """As when the last checkpoint is damaged, and the one before it is taken."""
    pytest.importorskip("tensorboardX")
    whole, states = Written(), list[RunState]()
    run(whole, TRAINING, Listening(keep=states.append))

    def stop(state: RunState) -> None:
        if state.task == 1 and state.stage is not None and state.stage.number == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(open_writer("tensorboard", tmp_path), TRAINING, Listening(keep=stop))
    run(open_writer("tensorboard", tmp_path), state=states[4])  # of an epoch before
    assert len(list(tmp_path.iterdir())) == 2
    assert_points(scalars_of(tmp_path), points_of(whole))


class FakeTrackio(ModuleType):
    """The part of the package that is used, as its version 0.43 has it."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.runs: list[tuple[dict[str, Any], list[tuple[int, dict[str, float]]]]] = []
        self.finished = 0

    def init(
        self,
        project: str,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        resume: str = "never",
        embed: bool = True,
    ) -> "FakeTrackio":
        print("* Trackio project initialized")
        about = {"project": project, "name": name, "config": config, "resume": resume, "embed": embed}
        self.runs.append((about, []))
        return self

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.runs[-1][1].append((step, metrics))

    def finish(self) -> None:
        self.finished += 1


def test_trackio_is_called_as_it_wants_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.delitem(sys.modules, "adapters.tracking.trackio", raising=False)
    whole, states = Written(), list[RunState]()
    run(whole, TRAINING, Listening(keep=states.append))
    folder = tmp_path / "five" / "became-seed0"
    run(open_writer("trackio", folder))
    run(open_writer("trackio", folder), state=states[4])
    monkeypatch.delitem(sys.modules, "adapters.tracking.trackio")
    (first, points), (second, rest) = fake.runs
    assert first == {"project": "five", "name": "became-seed0", "config": FLAT, "resume": "never", "embed": False}
    assert points == whole.points
    assert second == {**first, "resume": "allow"}
    assert rest == whole.points[5:]
    assert fake.finished == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("Trackio project") == 2
