"""Temperatures against their definitions in float64, and what a calibrated measurement measures."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.continual import Annealed, RunState, Task, Training, build_method, check_method, learn
from became_core.continual.measurement import Measurement
from became_core.continual.tempering import Tempering, calibrated, clipped_ratio, sharpness, temperature
from became_core.curvature import Categorical
from reference.formulas import best_sharpness, brute_force_minimiser, cross_entropy
from reference.formulas import temperature as by_definition
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import drifting_stream, prototype_stream

STREAM = prototype_stream(tasks=2, per_class=16, side=4, validation=0.25)
TRAINING = Training(Annealed(0.1, 3), Annealed(0.1, 2), batch_size=8)


def measurement(learner: ReferenceLearner, task: Task) -> Measurement:
    return Measurement(learner, task, TRAINING, "empirical", 0, "merge")


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_a_temperature_is_a_ratio_within_its_range(held_out: float, training: float) -> None:
    value = clipped_ratio(held_out, training)
    assert value == by_definition(held_out, training)
    assert 0.25 <= value <= 4


@given(st.integers(0, 10**6), st.floats(0.05, 20))
def test_the_sharpness_makes_the_held_out_loss_least(seed: int, scale: float) -> None:
    draw = np.random.default_rng(seed)
    logits, labels = scale * draw.normal(size=(30, 4)), draw.integers(0, 4, 30)
    labels[:15] = logits[:15].argmax(axis=1)
    found = sharpness(Categorical(), logits, labels)
    assert found == pytest.approx(best_sharpness(logits, labels), rel=1e-6)
    least = brute_force_minimiser(lambda factor: cross_entropy(factor * logits, labels), 0.25, 4, points=20)
    assert cross_entropy(found * logits, labels) <= cross_entropy(least * logits, labels) + 1e-9
    # A class that the task has not changes nothing.
    wider = np.concatenate([logits, np.full((30, 1), -np.inf)], axis=1)
    assert sharpness(Categorical(), wider, labels) == found


def test_logits_that_are_always_right_or_always_wrong_are_at_the_ends_of_the_range() -> None:
    logits = 3 * np.eye(3)
    assert sharpness(Categorical(), logits, np.arange(3)) == 4
    assert sharpness(Categorical(), logits, (np.arange(3) + 1) % 3) == 0.25


def test_a_calibrated_loss_is_that_of_larger_logits_and_its_slopes_those_of_its_differences() -> None:
    learner, task = ReferenceLearner(STREAM, hidden=(6, 5), seed=1), STREAM.tasks[1]
    before = learner.parameters()
    plain, factor = measurement(learner, task), 0.4
    tempered = replace(plain, sharpness=factor)
    logits, labels = learner.logits(task.train, 1000)[:, 1], STREAM.targets[task.train]
    assert tempered.loss() == pytest.approx(cross_entropy(factor * logits, labels), rel=1e-12)
    assert tempered.loss(before) == pytest.approx(tempered.loss(), rel=1e-12)
    draw = np.random.default_rng(0)
    direction = {name: draw.normal(size=value.shape) for name, value in before.items()}
    step = 1e-5
    ahead, behind = (
        tempered.loss({name: value + sign * step * direction[name] for name, value in before.items()})
        for sign in (1, -1)
    )
    assert float(tempered.along([direction]).slope[0]) == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)
    for key, value in learner.parameters().items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_calibrated_curvature_is_that_of_a_network_with_a_larger_head(structure: str) -> None:
    learner, task, factor = ReferenceLearner(STREAM, hidden=(6, 5), seed=1), STREAM.tasks[1], 0.4
    plain = measurement(learner, task)
    tempered = replace(plain, sharpness=factor)
    found = (tempered.diagonal() if structure == "diagonal" else tempered.kronecker()).diagonal()
    learner.assign({k: v * factor if k in learner.heads[1] else v for k, v in learner.parameters().items()})
    larger = (plain.diagonal() if structure == "diagonal" else plain.kronecker()).diagonal()
    for name, value in larger.items():
        # By the chain rule: the head's own entries are multiplied within the logits.
        np.testing.assert_allclose(found[name], value * (factor**2 if name in learner.heads[1] else 1), rtol=1e-12)


def test_a_calibrated_measurement_takes_its_sharpness_from_the_held_out_samples() -> None:
    learner, task = ReferenceLearner(STREAM, hidden=(6, 5), seed=1), STREAM.tasks[1]
    learner.assign({name: 2 * value for name, value in learner.parameters().items()})
    logits = learner.logits(task.validation, 1000)[:, 1]
    found = calibrated(measurement(learner, task))
    assert found.sharpness == pytest.approx(best_sharpness(logits, STREAM.targets[task.validation]), rel=1e-6)
    assert found.sharpness != 1


def test_a_posterior_is_tempered_task_by_task_and_the_first_task_as_the_second() -> None:
    """The last posterior is the sum of each task's diagonal times its own temperature."""
    learner = ReferenceLearner(STREAM, hidden=(6, 5), seed=1)
    method = build_method("became", {"threshold": 0.9, "temper": "rise"})
    states: list[RunState] = []
    learn(learner, STREAM, method, TRAINING, callbacks=[Listening(keep=states.append)])
    (before,) = [state for state in states if state.task == 1 and state.stage is None]
    last = states[-1]
    assert before.memory.posterior is not None
    assert last.memory.posterior is not None
    theta_gp, theta_hat = next(
        (state.theta_gp, state.theta) for state in reversed(states) if state.theta_gp is not None
    )
    assert theta_gp is not None
    learner.assign(theta_hat)
    factor = temperature("rise", measurement(learner, STREAM.tasks[1]), theta_gp)
    assert factor != 1
    assert last.record.temperatures == [factor, factor]
    learner.assign(last.theta)
    own = replace(measurement(learner, STREAM.tasks[1]), purpose="posterior").diagonal()
    old, new = before.memory.posterior.precision.diagonal(), last.memory.posterior.precision.diagonal()
    for name, value in own.values.items():
        np.testing.assert_allclose(new[name], factor * (old[name] + value), rtol=1e-12)


@pytest.mark.parametrize("temper", ["none", "calibrated"])
def test_where_nothing_is_compared_the_temperature_is_1(temper: Tempering) -> None:
    learner = ReferenceLearner(STREAM, hidden=(6, 5), seed=1)
    assert temperature(temper, measurement(learner, STREAM.tasks[1]), learner.parameters()) == 1


def test_what_cannot_be_tempered_is_refused() -> None:
    with pytest.raises(
        BecameError, match=r"became is tempered by held-out samples, and task 1 of prototypes has none;"
    ):
        check_method(build_method("became", {"temper": "rise"}), prototype_stream(tasks=2, validation=0.0))
    drifting = drifting_stream()
    tasks = tuple(replace(task, train=task.train[4:], validation=task.train[:4]) for task in drifting.tasks)
    with pytest.raises(BecameError, match=r"became\+none cannot be calibrated for drift, whose targets are no labels"):
        check_method(build_method("became+none", {"temper": "calibrated"}), replace(drifting, tasks=tasks))
