"""A run that is resumed from any of its states gives the same results as one without interruption."""

from dataclasses import fields

import numpy as np
import pytest

from became_core.continual import (
    SGD,
    Adam,
    Annealed,
    Best,
    Method,
    Patience,
    RunRecord,
    RunState,
    Schedule,
    Training,
    build_method,
    learn,
    method_names,
)
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream(per_class=16, side=4, validation=0.2)
SETTINGS = {"threshold": 0.9, "ewc_strength": 2.0, "ogd_samples": 12, "ogd_capacity": 8}
ANNEALED = Training(
    Annealed(0.2, 2), Annealed(0.2, 2), batch_size=8, optimiser=SGD(momentum=0.5), path_alphas=(0.0, 0.5, 1.0)
)
# A first best loss, worse ones, a smaller rate: what the schedule has seen decides what it does next.
PATIENT = Training(
    Patience(lr=0.6, patience=1, minimum=0.2, epochs=5),
    Patience(lr=0.6, patience=1, minimum=0.4, epochs=4, restores_best=False),
    batch_size=8,
    optimiser=Adam(),
)


def new_learner(seed: int = 0) -> ReferenceLearner:
    return ReferenceLearner(STREAM, hidden=(8, 6), bias=True, dropout=0.2, seed=seed)


def whole(method: Method, training: Training) -> tuple[RunRecord, ReferenceLearner, list[RunState]]:
    """Return the record, the learner and all states of a run without interruption."""
    learner, states = new_learner(), list[RunState]()
    return learn(learner, STREAM, method, training, callbacks=[Listening(keep=states.append)]), learner, states


def assert_equal_runs(
    record: RunRecord, learner: ReferenceLearner, expected: RunRecord, expected_learner: ReferenceLearner
) -> None:
    """Assert that two results are equal to the bit, without their seconds."""
    for field in fields(RunRecord):
        if field.name != "seconds":  # texts compare equal where both are NaN
            assert repr(getattr(record, field.name)) == repr(getattr(expected, field.name)), field.name
    for name, value in expected_learner.parameters().items():
        np.testing.assert_array_equal(learner.parameters()[name], value)


@pytest.mark.parametrize("training", [ANNEALED, PATIENT], ids=["annealed", "patient"])
@pytest.mark.parametrize("name", [*method_names(), "became+trgp", "became+ogd", "ewc+gpm"])
def test_a_run_resumed_from_any_state_is_the_same_run(name: str, training: Training) -> None:
    assert_resumable(build_method(name, SETTINGS), training, every=1 if name == "became" else 3)


def assert_resumable(method: Method, training: Training, every: int = 1) -> None:
    """Assert that a run which goes on from every so many of its states is the whole run."""
    expected, expected_learner, states = whole(method, training)
    for state in states[::every]:
        learner = new_learner(seed=1)  # its own weights must not matter
        record = learn(learner, STREAM, method, training, state=state)
        assert_equal_runs(record, learner, expected, expected_learner)


@pytest.mark.parametrize("training", [ANNEALED, PATIENT], ids=["annealed", "patient"])
def test_a_run_that_calibrates_across_tasks_is_the_same_from_any_state(training: Training) -> None:
    assert_resumable(build_method("became", SETTINGS | {"precision": "across"}), training)


def test_there_is_one_state_for_each_epoch_and_task() -> None:
    record, _, states = whole(build_method("became", SETTINGS), ANNEALED)
    places = [(s.task, s.stage and s.stage.number, s.stage and s.stage.schedule.epoch) for s in states]
    first = [(0, 1, 1), (0, 1, 2), (0, 1, 3), (0, 1, 4), (1, None, None)]
    later = [place for t in (1, 2) for place in [(t, 1, 1), (t, 1, 2), (t, 2, 1), (t, 2, 2), (t + 1, None, None)]]
    assert places == first + later
    assert [len(state.record.alpha) for state in states] == [state.task for state in states]
    assert all((state.theta_gp is not None) == (place[1] == 2) for state, place in zip(states, places, strict=True))
    assert states[-1].record is record
    assert np.isnan(states[3].record.accuracy).all()  # A later task has not changed it.


def test_the_best_model_is_part_of_a_state() -> None:
    _, _, states = whole(build_method("gpm", SETTINGS), PATIENT)
    models = [(state.stage.best, state.theta) for state in states if state.stage is not None]
    assert any(
        isinstance(best, Best) and not np.array_equal(best.theta["fc1.weight"], theta["fc1.weight"])
        for best, theta in models
    )


def test_the_seconds_of_all_parts_are_summed() -> None:
    method = build_method("finetune", SETTINGS)
    _, _, states = whole(method, ANNEALED)
    middle = states[4]
    assert middle.record.seconds["total"] >= middle.record.seconds["stage1"] > 0
    aged = RunState(
        middle.theta,
        middle.memory,
        RunRecord(
            middle.record.accuracy, middle.record.class_incremental_accuracy, seconds={"stage1": 100.0, "total": 200.0}
        ),
        task=2,
    )
    record = learn(new_learner(), STREAM, method, ANNEALED, state=aged)
    assert 100 < record.seconds["stage1"] < 130
    assert 200 < record.seconds["total"] < 230
    assert record.seconds["evaluation"] < 30


def test_an_exception_of_on_state_ends_the_run_and_leaves_the_state() -> None:
    class Enough(Exception):  # noqa: N818 # it is no error
        pass

    states: list[RunState] = []

    def keep(state: RunState) -> None:
        states.append(state)
        if len(states) == 3:
            raise Enough

    schedule: Schedule = Annealed(0.2, 4)
    learner = new_learner()
    with pytest.raises(Enough):
        learn(
            learner,
            STREAM,
            build_method("finetune", SETTINGS),
            Training(schedule, schedule),
            callbacks=[Listening(keep=keep)],
        )
    assert len(states) == 3
    np.testing.assert_array_equal(states[-1].theta["fc1.weight"], learner.parameters()["fc1.weight"])
