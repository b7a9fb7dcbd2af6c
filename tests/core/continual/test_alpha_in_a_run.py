"""The alpha of a whole run against an oracle with explicit per-sample gradients, Jacobians and dense matrices."""

import numpy as np
import pytest
from numpy.typing import NDArray

from became_core.continual import Annealed, EpochEnd, Task, TaskEnd, Training, build_method, learn
from reference.formulas import alpha_star, directional_derivatives, softmax, squared_mean_gradient
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

Array = NDArray[np.float64]
STREAM = prototype_stream(tasks=2, per_class=12, side=4)
BATCH = 8
NAMES = ("fc1.weight", "fc2.weight", "heads.0.weight", "heads.1.weight")


def flat(tree: dict[str, Array]) -> Array:
    return np.concatenate([tree[name].ravel() for name in NAMES])


def new_learner() -> ReferenceLearner:
    return ReferenceLearner(STREAM, hidden=(6, 5), seed=1)


def jacobians(theta: dict[str, Array], task: Task) -> tuple[Array, Array]:
    """The logits of a task's training rows and their derivative by each single parameter, [n, k] and [n, k, d]."""
    learner = new_learner()
    learner.assign(theta)
    columns = []
    for name in NAMES:
        for entry in range(theta[name].size):
            unit = {other: np.zeros_like(value) for other, value in theta.items()}
            unit[name].flat[entry] = 1.0
            (batch,) = learner.pushforward(task.index, task.train, len(task.train), [unit])
            columns.append(batch.tangents[0])
    return learner.logits(task.train, 1000)[:, task.index], np.stack(columns, axis=2)


def empirical_fisher(theta: dict[str, Array], task: Task) -> Array:
    """Return the mean over samples of squared gradients, each computed from the Jacobian and the label."""
    logits, jacobian = jacobians(theta, task)
    total = np.zeros(jacobian.shape[2])
    for z, j, label in zip(logits, jacobian, STREAM.targets[task.train], strict=True):
        total += (j.T @ (softmax(z) - np.eye(3)[label])) ** 2 / len(logits)
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


@pytest.mark.parametrize("name", ["became", "became-paper"])
@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_alpha_is_that_of_the_oracle(name: str, rate: float) -> None:
    learner = new_learner()
    seen: dict[tuple[int, int], dict[str, Array]] = {}

    def observe(event: EpochEnd | TaskEnd) -> None:
        seen[event.task, event.stage if isinstance(event, EpochEnd) else 0] = learner.parameters()

    training = Training(Annealed(rate, 4), Annealed(rate, 3, final_lr=rate / 2), batch_size=BATCH)
    method = build_method(name, {"threshold": 0.9})
    record = learn(learner, STREAM, method, training, seed=3, callbacks=[Listening(observe)])

    first, second = STREAM.tasks
    mu, theta_gp, theta_hat = seen[0, 0], seen[1, 1], seen[1, 2]
    delta = flat(theta_hat) - flat(theta_gp)
    if name == "became":
        old, new = empirical_fisher(mu, first), empirical_fisher(theta_hat, second)
        targets = STREAM.targets[second.train]
        (slope,), ((exact,),) = directional_derivatives(*jacobians(theta_hat, second), targets, delta[None])
        (start,), _ = directional_derivatives(*jacobians(theta_gp, second), targets, delta[None])
        kappa = exact / (delta @ (new * delta))
        assert slope > start  # along delta the new loss is convex
        # Any gradient of that slope and any curvature of that form will do: only their values along delta count.
        gradient, secant = slope * delta / (delta @ delta), (slope - start) / (delta @ delta)
        arguments = (kappa * np.diag(old), secant * np.eye(len(delta)), gradient, flat(mu))
    else:
        old, new = batch_fisher(mu, first), batch_fisher(theta_hat, second)
        arguments = (np.diag(old), np.diag(new), np.zeros_like(delta), flat(theta_gp))
    expected = min(max(alpha_star(flat(theta_gp), flat(theta_hat), *arguments), 0.0), 1.0)
    assert record.alpha[1] == pytest.approx(expected, rel=1e-9)


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
