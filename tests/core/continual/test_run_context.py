"""Constraints of a stage: which parameters are trained, frozen or penalised, and the learning rate of each group."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from became_core import BecameError
from became_core.continual import Annealed, RelativeRates, Training, build_method, learn
from became_core.continual.run_context import relative_rates, stable_constraint
from became_core.continual.state import Memory, RunState
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream()
TRAINING = Training(Annealed(0.2, 3), Annealed(0.2, 2), batch_size=16)
BIASES = frozenset({"fc1.bias", "fc2.bias"})


def after_tasks(name: str, settings: Mapping[str, Any], training: Training = TRAINING) -> list[RunState]:
    """Return the states after each task."""
    states: list[RunState] = []

    def keep(state: RunState) -> None:
        if state.stage is None:
            states.append(state)

    learn(
        ReferenceLearner(STREAM, bias=True),
        STREAM,
        build_method(name, settings),
        training,
        callbacks=[Listening(keep=keep)],
    )
    return states


def moved(before: RunState, after: RunState) -> float:
    return float(sum(np.abs(after.theta[name] - before.theta[name]).sum() for name in BIASES))


@pytest.mark.parametrize("name", ["gpm", "nscl", "became"])
def test_unprotected_parameters_are_frozen_or_penalised(name: str) -> None:
    """Biases move less under a stronger penalty; without a penalty they are frozen."""
    moves = []
    for strength in (0.0, 0.1, 1e5):
        states = after_tasks(name, {"norm_penalty": strength})
        moves.append(moved(states[0], states[1]))
    frozen, weak, strong = moves
    if name != "became":  # whose stage 2 is free
        assert frozen == 0
        assert 0 < strong < 0.5 * weak
    assert len(set(moves)) == 3


def test_the_penalty_of_unprotected_parameters_is_the_published_sum() -> None:
    """Wang 2021: strength x 1/2 sum_t F_t (theta - theta_t)^2, with its minimum at the weighted mean of the theta_t."""
    method = build_method("nscl", {"norm_penalty": 200.0})
    states = after_tasks("nscl", {"norm_penalty": 200.0})
    learner = ReferenceLearner(STREAM, bias=True)
    constraint = stable_constraint(learner, STREAM.tasks[2], method, states[1].memory)
    assert constraint.penalty is not None
    assert constraint.penalty.strength == 200
    assert constraint.trainable == frozenset(learner.parameters()) - learner.heads[0] - learner.heads[1]
    assert set(constraint.penalty.posterior.mean) == BIASES
    first, both = (state.memory.posterior for state in states[:2])
    assert first is not None
    assert both is not None
    for name in BIASES:
        f1 = first.precision.diagonal()[name]
        f2 = both.precision.diagonal()[name] - f1
        ends = [state.theta[name] for state in states[:2]]
        known = f1 + f2 > 1e-12
        expected = (f1 * ends[0] + f2 * ends[1])[known] / (f1 + f2)[known]
        np.testing.assert_allclose(constraint.penalty.posterior.mean[name][known], expected, rtol=1e-6)


def test_there_is_no_such_penalty_without_memory_or_with_a_penalty_on_all_weights() -> None:
    learner, settings = ReferenceLearner(STREAM, bias=True), {"norm_penalty": 200.0, "ewc_strength": 3.0}
    assert stable_constraint(learner, STREAM.tasks[0], build_method("nscl", settings), Memory()).penalty is None
    memory = after_tasks("ewc+gpm", settings)[0].memory
    constraint = stable_constraint(learner, STREAM.tasks[1], build_method("ewc+gpm", settings), memory)
    assert constraint.penalty is not None
    assert constraint.penalty.strength == 3
    assert constraint.trainable >= BIASES
    for name in ("ogd", "finetune", "ewc", "hat", "packnet"):
        assert build_method(name, settings).norm_penalty == 0


def test_relative_rates_depend_on_the_group_and_the_task() -> None:
    learner, rates = ReferenceLearner(STREAM, bias=True), RelativeRates(heads=20.0, norms=10.0, first=2.0)
    first, later = (relative_rates(learner, STREAM.tasks[index], rates) for index in (0, 1))
    assert first == dict.fromkeys(learner.projectable, 2.0) | later
    assert later == dict.fromkeys(frozenset().union(*learner.heads), 20.0) | dict.fromkeys(BIASES, 10.0)
    assert relative_rates(learner, STREAM.tasks[0], RelativeRates()) == {}


def test_a_head_that_all_tasks_share_has_the_rate_of_heads() -> None:
    learner, rates = ReferenceLearner(STREAM, bias=True), RelativeRates(heads=20.0, norms=10.0, first=2.0)
    hidden, (head, *_) = learner.projectable, learner.heads
    learner.projectable, learner.shared_head = hidden | head, head
    learner.heads = [frozenset[str]() for _ in STREAM.tasks]
    found = relative_rates(learner, STREAM.tasks[0], rates)
    assert {name: found[name] for name in hidden | head} == dict.fromkeys(hidden, 2.0) | dict.fromkeys(head, 20.0)


def test_equal_relative_rates_act_like_another_learning_rate() -> None:
    """Relative rates of 2 at half the learning rate give the same run."""
    halved = Training(Annealed(0.1, 3), Annealed(0.1, 2), batch_size=16, relative=RelativeRates(2.0, 2.0, 2.0))
    plain, same = (after_tasks("finetune", {}, training)[0] for training in (TRAINING, halved))
    for name, value in plain.theta.items():
        np.testing.assert_allclose(same.theta[name], value, rtol=1e-9, atol=1e-12)


def test_a_relative_rate_of_0_is_refused() -> None:
    with pytest.raises(BecameError, match=r"relative learning rate 'norms' is 0\.0; it must be above 0"):
        RelativeRates(norms=0.0)
