"""Calibration of remembered curvatures against explicit Jacobians."""

from collections.abc import Sequence

import numpy as np
import pytest

from became_core.arrays import Params, difference
from became_core.continual import Annealed, RunState, Task, Training, build_method, learn
from became_core.continual.calibration import calibration
from became_core.continual.measurement import Measurement
from became_core.laplace import Diagonal, Quadratic
from reference.formulas import directional_derivatives, softmax
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=3, per_class=12, side=4)
TRAINING = Training(Annealed(0.1, 3), Annealed(0.1, 2), batch_size=8)


def new_learner() -> ReferenceLearner:
    return ReferenceLearner(STREAM, hidden=(6, 5), seed=1)


def measurement(learner: ReferenceLearner, task: Task) -> Measurement:
    return Measurement(learner, task, TRAINING, "empirical", 0, "posterior")


def by_jacobian(theta: Params, task: Task, movement: Params) -> float:
    """d.GGN.d / d.F.d at theta, from the derivatives of the logits and of each sample's loss along the movement."""
    learner = new_learner()
    learner.assign(theta)
    logits = learner.logits(task.train, 1000)[:, task.index]
    labels = STREAM.targets[task.train]
    jacobian = learner.jacobian(task.index, task.train, list(movement))
    way = np.concatenate([value.ravel() for value in movement.values()])
    gradients = np.einsum("nk,nkd->nd", softmax(logits) - np.eye(logits.shape[1])[labels], jacobian)
    _, ((exact,),) = directional_derivatives(logits, jacobian, labels, way[None])
    return float(exact / (np.mean(gradients**2, axis=0) @ way**2))


def test_a_calibration_is_a_ratio_of_curvatures_whatever_the_length_of_the_movement() -> None:
    learner, rng = new_learner(), np.random.default_rng(0)
    task = STREAM.tasks[1]
    movement = {name: rng.normal(size=value.shape) for name, value in learner.parameters().items()}
    of_task = measurement(learner, task)
    found = calibration(of_task, of_task.diagonal(), movement)
    assert found == pytest.approx(by_jacobian(learner.parameters(), task, movement), rel=1e-9)
    longer = {name: 1e3 * value for name, value in movement.items()}
    assert calibration(of_task, of_task.diagonal(), longer) == pytest.approx(found, rel=1e-12)


def test_along_a_movement_of_no_curvature_nothing_is_calibrated() -> None:
    learner = new_learner()
    of_task = measurement(learner, STREAM.tasks[1])
    other_head = {n: np.ones_like(v) * (n in learner.heads[0]) for n, v in learner.parameters().items()}
    assert calibration(of_task, of_task.diagonal(), other_head) == 1


def test_a_loss_that_bends_down_along_a_movement_calibrates_nothing() -> None:
    """As the curvature of a loss that is no likelihood may: a precision may not be negative."""

    class Concave:
        def along(self, directions: Sequence[Params]) -> Quadratic:
            return Quadratic(np.zeros(1), -np.ones((1, 1)))

    movement = {"w": np.ones(3)}
    assert calibration(Concave(), Diagonal({"w": np.ones(3)}), movement) == 1


def test_each_task_is_calibrated_along_the_movement_of_the_task_before() -> None:
    """The last posterior is the sum of each task's diagonal times its kappa; the first has that of the second."""
    learner, states = new_learner(), list[RunState]()
    initial = learner.parameters()
    method = build_method("became", {"threshold": 0.9, "precision": "across"})
    record = learn(learner, STREAM, method, TRAINING, callbacks=[Listening(keep=states.append)])
    merged = [state.theta for state in states if state.stage is None]
    theta_gp, theta_hat = {}, {}
    for state in states:
        if state.theta_gp is not None:
            theta_gp[state.task], theta_hat[state.task] = state.theta_gp, state.theta
    movements = [difference(merged[0], initial), difference(theta_hat[1], theta_gp[1])]
    _, second, third = STREAM.tasks
    kappas = [
        by_jacobian(theta_gp[1], second, movements[0]),
        by_jacobian(merged[1], second, movements[0]),
        by_jacobian(merged[2], third, movements[1]),
    ]
    assert len({round(kappa, 3) for kappa in [1.0, *kappas]}) == 4
    assert record.temperatures == pytest.approx(kappas, rel=1e-9)
    total: Params = dict.fromkeys(initial, 0.0)
    for theta, task, kappa in zip(merged, STREAM.tasks, kappas, strict=True):
        learner.assign(theta)
        total = {n: total[n] + kappa * v for n, v in measurement(learner, task).diagonal().values.items()}
    posterior = states[-1].memory.posterior
    assert posterior is not None
    for name, value in posterior.precision.diagonal().items():
        np.testing.assert_allclose(value, total[name], rtol=1e-9)
    movement = states[-1].memory.movement
    assert movement is not None
    for name, value in difference(theta_hat[2], theta_gp[2]).items():
        np.testing.assert_array_equal(movement[name], value)


def test_a_method_that_calibrates_at_the_merge_stores_no_movement() -> None:
    states = list[RunState]()
    learn(new_learner(), STREAM, build_method("became"), TRAINING, callbacks=[Listening(keep=states.append)])
    assert all(state.memory.movement is None and state.before is None for state in states)
