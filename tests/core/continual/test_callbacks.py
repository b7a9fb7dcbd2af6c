"""When callbacks are called, with which arguments, and that an exception of theirs ends the run."""

import inspect
import textwrap
from typing import Any

import numpy as np
import pytest

import became_core.continual as continual
from became_core.continual import (
    Annealed,
    Callback,
    EpochEnd,
    RunRecord,
    RunState,
    TaskEnd,
    Training,
    build_method,
    learn,
)
from became_core.continual import callbacks as module
from reference.learner import ReferenceLearner
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=2)
TRAINING = Training(Annealed(0.1, 2), Annealed(0.1, 1), batch_size=16)
METHOD = build_method("became")


class Recorder(Callback):
    """Appends every call, with the name of the recorder, to a list that several recorders can share."""

    def __init__(self, heard: list[tuple[str, str, Any]], name: str = "") -> None:
        self.heard, self.name = heard, name

    def on_run_begin(self, state: RunState) -> None:
        self.heard.append((self.name, "begin", state))

    def on_epoch_end(self, event: EpochEnd) -> None:
        self.heard.append((self.name, "epoch", event))

    def on_task_end(self, event: TaskEnd) -> None:
        self.heard.append((self.name, "task", event))

    def on_state(self, state: RunState) -> None:
        self.heard.append((self.name, "state", state))

    def on_run_end(self, record: RunRecord) -> None:
        self.heard.append((self.name, "end", record))


def test_callbacks_are_called_in_order_and_get_states_after_all_have_the_event() -> None:
    heard: list[tuple[str, str, Any]] = []
    record = learn(
        ReferenceLearner(STREAM),
        STREAM,
        METHOD,
        TRAINING,
        callbacks=[Recorder(heard, "a"), Callback(), Recorder(heard, "b")],
    )
    epoch, task = ["epoch", "state"], ["task", "state"]
    # The first task is trained once, for both stages' epochs.
    expected = ["begin", *3 * epoch, *task, *3 * epoch, *task, "end"]
    assert [(name, what) for name, what, _ in heard] == [(name, what) for what in expected for name in "ab"]
    assert heard[-1][2] is record
    for (_, what, event), (_, _, state) in zip(heard[0::2][1:-1:2], heard[0::2][2:-1:2], strict=True):
        if what == "epoch":
            assert (state.task, state.stage.number, state.stage.schedule.epoch) == (
                event.task,
                event.stage,
                event.epoch,
            )
        else:
            assert (state.task, state.stage) == (event.task + 1, None)
            np.testing.assert_array_equal(state.record.accuracy[event.task, : event.task + 1], event.accuracy)


def test_a_resumed_run_begins_with_the_state_that_it_was_given() -> None:
    whole: list[tuple[str, str, Any]] = []
    learn(ReferenceLearner(STREAM), STREAM, METHOD, TRAINING, callbacks=[Recorder(whole)])
    state = whole[4][2]
    rest: list[tuple[str, str, Any]] = []
    learn(ReferenceLearner(STREAM), STREAM, METHOD, TRAINING, state=state, callbacks=[Recorder(rest)])
    assert rest[0][1:] == ("begin", state)
    assert [what for _, what, _ in rest[1:]] == [what for _, what, _ in whole[5:]]
    assert [value for _, what, value in rest if what == "epoch"] == [
        value for _, what, value in whole[5:] if what == "epoch"
    ]
    done: list[tuple[str, str, Any]] = []
    learn(ReferenceLearner(STREAM), STREAM, METHOD, TRAINING, state=whole[-2][2], callbacks=[Recorder(done)])
    assert [what for _, what, _ in done] == ["begin", "end"]


@pytest.mark.parametrize("place", ["on_run_begin", "on_epoch_end", "on_task_end", "on_state", "on_run_end"])
def test_an_exception_of_a_callback_ends_the_run_before_later_callbacks(place: str) -> None:
    class Enough(Exception):  # noqa: N818 # it is no error
        pass

    def enough(value: object) -> None:
        raise Enough(value)

    stopping = Callback()
    setattr(stopping, place, enough)
    heard: list[tuple[str, str, Any]] = []
    with pytest.raises(Enough):
        learn(
            ReferenceLearner(STREAM),
            STREAM,
            METHOD,
            TRAINING,
            callbacks=[Recorder(heard, "a"), stopping, Recorder(heard, "b")],
        )
    assert heard[-1][0] == "a"
    assert heard[-1][1] == place.removeprefix("on_").removeprefix("run_").removesuffix("_end")


def test_the_example_prints_the_accuracies_of_each_task(capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect.getdoc(module) or ""
    example = textwrap.dedent("\n".join(line for line in text.splitlines() if line.startswith("    ") or not line))
    names = {name: getattr(continual, name) for name in continual.__all__}
    arguments = {"learner": ReferenceLearner(STREAM), "stream": STREAM, "method": METHOD, "training": TRAINING}
    exec(compile(example, "the example of callbacks.py", "exec"), names | arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["task 1", "task 2"]
    assert lines[1].count(",") == 1
