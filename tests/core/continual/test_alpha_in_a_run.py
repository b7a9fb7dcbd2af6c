"""The alpha of a whole run against an oracle with explicit per-sample gradients, Jacobians and dense matrices."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from became_core.continual import (
    Annealed,
    CurvatureData,
    EpochEnd,
    Task,
    TaskEnd,
    TaskStream,
    Training,
    build_method,
    learn,
    measured_on,
)
from reference.formulas import (
    alpha_star,
    best_sharpness,
    cross_entropy,
    directional_derivatives,
    softmax,
    squared_mean_gradient,
    temperature,
)
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

Array = NDArray[np.float64]
STREAM = prototype_stream(tasks=2, per_class=12, side=4)
HOLDING_OUT = prototype_stream(tasks=2, per_class=16, side=4, validation=0.3)
BATCH = 8
NAMES = ("fc1.weight", "fc2.weight", "heads.0.weight", "heads.1.weight")


def flat(tree: dict[str, Array]) -> Array:
    return np.concatenate([tree[name].ravel() for name in NAMES])


def new_learner(stream: TaskStream = STREAM) -> ReferenceLearner:
    return ReferenceLearner(stream, hidden=(6, 5), seed=1)


def jacobians(
    theta: dict[str, Array], task: Task, stream: TaskStream = STREAM, rows: NDArray[np.int64] | None = None
) -> tuple[Array, Array]:
    """The logits of a task's training rows and their derivative by each single parameter, [n, k] and [n, k, d]."""
    learner = new_learner(stream)
    rows = task.train if rows is None else rows
    learner.assign(theta)
    return learner.logits(rows, 1000)[:, task.index], learner.jacobian(task.index, rows, NAMES)


def empirical_fisher(theta: dict[str, Array], task: Task) -> Array:
    return mean_square(*jacobians(theta, task), STREAM.targets[task.train])


def mean_square(logits: Array, jacobian: Array, labels: NDArray[np.int64]) -> Array:
    """Return the mean over samples of squared gradients, each computed from the Jacobian and the label."""
    total = np.zeros(jacobian.shape[2])
    for z, j, label in zip(logits, jacobian, labels, strict=True):
        total += (j.T @ (softmax(z) - np.eye(3)[label])) ** 2 / len(logits)
    return total


def expected_fisher(theta: dict[str, Array], task: Task) -> Array:
    """Return the mean over samples of squared gradients by every label, weighted by its predicted probability."""
    logits, jacobian = jacobians(theta, task)
    total = np.zeros(jacobian.shape[2])
    for z, j in zip(logits, jacobian, strict=True):
        for label, probability in enumerate(softmax(z)):
            total += probability * (j.T @ (softmax(z) - np.eye(3)[label])) ** 2 / len(logits)
    return total


def batch_fisher(theta: dict[str, Array], task: Task) -> Array:
    """The published estimate: the sum over batches of size x (gradient of the batch's mean loss)^2, in our unit.

    By the model's own labels. The unit is BATCH times the published one, which divides by all samples.
    """
    logits, jacobian = jacobians(theta, task)
    total = np.zeros(jacobian.shape[2])
    for start in range(0, len(logits), BATCH):
        z, j = logits[start : start + BATCH], jacobian[start : start + BATCH]
        at_logits = softmax(z) - np.eye(3)[z.argmax(axis=1)]
        per_sample = np.einsum("nkd,nk->nd", j, at_logits)
        square, _ = squared_mean_gradient(per_sample[:, None, :], np.ones((len(z), 1, 1)))
        total += BATCH / len(logits) * square[0]
    return total


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_the_published_alpha_is_that_of_the_oracle(rate: float) -> None:
    alpha, mu, theta_gp, theta_hat = observed(STREAM, rate, "became-paper")
    first, second = STREAM.tasks
    old, new = np.diag(batch_fisher(mu, first)), np.diag(batch_fisher(theta_hat, second))
    gp, hat = flat(theta_gp), flat(theta_hat)
    expected = min(max(alpha_star(gp, hat, old, new, np.zeros_like(gp), gp), 0.0), 1.0)
    assert alpha == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("fisher", "precision"), [("empirical", "exact"), ("true", "exact"), ("empirical", "across")])
@pytest.mark.parametrize(("rate", "bends_down"), [(0.05, False), (0.3, False), (0.4, True), (0.45, True)])
def test_alpha_is_that_of_the_oracle(fisher: str, precision: str, rate: float, bends_down: bool) -> None:
    """A new loss that bends down between the models is the parabola that falls as far, and is least at theta_hat."""
    alpha, mu, theta_gp, theta_hat = observed(STREAM, rate, "became", fisher=fisher, precision=precision)
    first, second = STREAM.tasks
    delta, targets = flat(theta_hat) - flat(theta_gp), STREAM.targets[second.train]
    diagonal = expected_fisher if fisher == "true" else empirical_fisher
    (end,), _ = directional_derivatives(*jacobians(theta_hat, second), targets, delta[None])
    (start,), _ = directional_derivatives(*jacobians(theta_gp, second), targets, delta[None])
    before, after = (cross_entropy(jacobians(theta, second)[0], targets) for theta in (theta_gp, theta_hat))
    assert bends_down == (start >= end)
    if bends_down:
        start, end = -2 * (before - after), 0.0
        assert start < 0
    # Before the first merge, the first task's curvature is calibrated at theta_gp along that task's own movement.
    there, way = (
        (theta_gp, flat(mu) - flat(new_learner().parameters())) if precision == "across" else (theta_hat, delta)
    )
    _, ((exact,),) = directional_derivatives(*jacobians(there, second), targets, way[None])
    kappa = exact / (way @ (diagonal(there, second) * way))
    # Any gradient of that slope and any curvature of that form will do: only their values along delta count.
    gradient, secant = end * delta / (delta @ delta), (end - start) / (delta @ delta)
    arguments = kappa * np.diag(diagonal(mu, first)), secant * np.eye(len(delta)), gradient, flat(mu)
    expected = alpha_star(flat(theta_gp), flat(theta_hat), *arguments)
    assert not bends_down or 0 < expected < 1
    assert alpha == pytest.approx(min(max(expected, 0.0), 1.0), rel=1e-9)


def observed(
    stream: TaskStream, rate: float, name: str, **settings: Any
) -> tuple[float | None, dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Return the alpha of a run's merge, and the weights after task 1, after stage 1 and after stage 2."""
    learner = new_learner(stream)
    seen: dict[tuple[int, int], dict[str, Array]] = {}

    def observe(event: EpochEnd | TaskEnd) -> None:
        seen[event.task, event.stage if isinstance(event, EpochEnd) else 0] = learner.parameters()

    training = Training(Annealed(rate, 4), Annealed(rate, 3, final_lr=rate / 2), batch_size=BATCH)
    method = build_method(name, {"threshold": 0.9, **settings})
    record = learn(learner, stream, method, training, seed=3, callbacks=[Listening(observe)])
    return record.alpha[1], seen[0, 0], seen[1, 1], seen[1, 2]


@pytest.mark.parametrize("rate", [0.05, 0.1])
@pytest.mark.parametrize(
    ("data", "temper"),
    [
        *(("validation", "none"), ("augmented", "none"), ("training", "curvature"), ("training", "rise")),
        *(("augmented", "curvature"), ("training", "calibrated"), ("validation", "calibrated")),
    ],
)
def test_alpha_of_other_samples_and_of_a_tempered_posterior_is_that_of_the_oracle(
    data: CurvatureData, temper: str, rate: float
) -> None:
    """The curvature of both sides, and the slopes of the new one, are of the samples asked for, and tempered."""
    stream = measured_on(HOLDING_OUT, data, seed=3)
    alpha, mu, theta_gp, theta_hat = observed(stream, rate, "became", temper=temper)
    first, second = stream.tasks
    delta = flat(theta_hat) - flat(theta_gp)

    def outputs(theta: dict[str, Array], task: Task, held_out: bool = False) -> tuple[Array, Array, Any]:
        rows = task.validation if held_out else task.train if task.curvature is None else task.curvature
        return (*jacobians(theta, task, stream, rows), stream.targets[rows])

    def sharpened(theta: dict[str, Array], task: Task, at: dict[str, Array]) -> tuple[Array, Array, Any]:
        logits, _, labels = outputs(at, task, held_out=True)
        factor = best_sharpness(logits, labels) if temper == "calibrated" else 1.0
        logits, jacobian, labels = outputs(theta, task)
        return factor * logits, factor * jacobian, labels

    def slope(sample: tuple[Array, Array, Any]) -> float:
        return float(directional_derivatives(*sample, delta[None])[0][0])

    new = sharpened(theta_hat, second, theta_hat)
    _, ((exact,),) = directional_derivatives(*new, delta[None])
    start, end = slope(sharpened(theta_gp, second, theta_hat)), slope(new)
    assert end > start
    kappa = exact / (delta @ (mean_square(*new) * delta))
    tau = 1.0
    if temper == "curvature":
        tau = temperature(
            *(slope(outputs(theta_hat, second, it)) - slope(outputs(theta_gp, second, it)) for it in (True, False))
        )
    elif temper == "rise":
        tau = temperature(
            *(
                cross_entropy(*outputs(theta_gp, second, it)[::2]) - cross_entropy(*outputs(theta_hat, second, it)[::2])
                for it in (True, False)
            )
        )
    assert temper not in ("curvature", "rise") or tau != 1
    old = tau * kappa * np.diag(mean_square(*sharpened(mu, first, mu)))
    gradient, secant = end * delta / (delta @ delta), (end - start) / (delta @ delta)
    expected = alpha_star(flat(theta_gp), flat(theta_hat), old, secant * np.eye(len(delta)), gradient, flat(mu))
    assert alpha == pytest.approx(min(max(expected, 0.0), 1.0), rel=1e-7)


@pytest.mark.parametrize("name", ["became", "became-paper"])
def test_decay_of_old_curvature_increases_alpha(name: str) -> None:
    """It is so from the third task on. At the second, the curvature of the only old task has not decayed yet."""
    stream = prototype_stream(tasks=3, per_class=12, side=4)
    training = Training(Annealed(0.3, 30), Annealed(0.3, 30), batch_size=BATCH)
    second, third = [], []
    for decay in (1.0, 0.5, 0.0):
        learner = ReferenceLearner(stream, hidden=(6, 5), seed=1)
        method = build_method(name, {"threshold": 0.9, "decay": decay})
        alpha = np.asarray(learn(learner, stream, method, training, seed=3).alpha, dtype=float)
        second.append(alpha[1])
        third.append(alpha[2])
    assert second[0] == second[1] == second[2]
    assert 0 < third[0] < third[1] < third[2] < 1
