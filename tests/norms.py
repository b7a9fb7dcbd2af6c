"""What kinds of normalisation promise, whatever the framework: checks of learners of small convolutional networks.

Each check takes ``make(architecture, stream)``, which returns a fresh learner in double precision.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.networks import (
    Architecture,
    BatchNorm,
    Convolution,
    Dropout,
    Flatten,
    GroupNorm,
    Layer,
    Linear,
    ReLU,
    Residual,
)
from became_core import BecameError
from became_core.arrays import Params
from became_core.continual import (
    SGD,
    Annealed,
    Batch,
    Constraint,
    Learner,
    Patience,
    RunState,
    TaskStream,
    Training,
    build_method,
    learn,
)
from became_core.continual.data import Task
from became_core.continual.evaluation import mean_loss
from became_core.continual.learner import refresh_statistics, weights_of
from became_core.continual.measurement import Measurement
from tests.backends import to_numpy
from tests.listening import Listening
from tests.streams import prototype_stream

__all__ = ["CHECKS", "MakeNormalised", "normalised"]

MakeNormalised = Callable[[Architecture, TaskStream], Learner]
STREAM = prototype_stream(tasks=2, classes_per_task=3, per_class=16, side=8, validation=1 / 3)
# Statistics are compared: in double precision, but for sums of squares.
RTOL = 1e-9


def normalised(kind: str, stream: TaskStream = STREAM) -> Architecture:
    """Two layers of images, one in a residual block, and a flat one, each normalised; "batch", "running" or "group"."""

    def norm(name: str) -> Layer:
        return GroupNorm(name, most=2) if kind == "group" else BatchNorm(name, running=kind == "running")

    block = Residual((Convolution("conv2", 4, 3, padding=1), norm("norm2")))
    layers = (
        *(Convolution("conv1", 4, 3, stride=2, padding=1), norm("norm1"), ReLU(), Dropout(0.25), block, ReLU()),
        *(Flatten(), Linear("fc1", 8), norm("norm3"), ReLU()),
    )
    return Architecture(layers, stream.dataset.images.shape[1:])


def numbers(tree: Params) -> dict[str, NDArray[Any]]:
    return {name: np.array(to_numpy(value)) for name, value in tree.items()}


def stepped(learner: Learner, steps: int = 3) -> None:
    """Some steps on the first task, so that no layer is the identity."""
    rows = STREAM.tasks[0].train
    constraint = Constraint(frozenset(weights_of(learner)) - learner.heads[1])
    batches = [Batch(0, rows[start : start + 12]) for start in range(steps)]
    learner.train(batches, np.full(steps, 0.1), constraint, SGD(), np.random.default_rng(1))


def trained(make: MakeNormalised, kind: str) -> Learner:
    learner = make(normalised(kind), STREAM)
    stepped(learner)
    move_to(learner, weights_of(learner), STREAM.tasks[:1], 12, 0)
    return learner


def move_to(learner: Learner, weights: Params, tasks: Sequence[Task], batch_size: int, seed: int) -> None:
    """Give a learner these weights, and the running statistics that belong to them."""
    learner.assign(learner.parameters() | weights)
    refresh_statistics(learner, tasks, batch_size, seed)


def check_whether_an_images_batch_matters(make: MakeNormalised) -> None:
    rows = STREAM.tasks[0].test
    for kind in ("batch", "running", "group"):
        learner = trained(make, kind)
        together, by_four = (to_numpy(learner.logits(rows, size)) for size in (len(rows), 4))
        assert np.allclose(by_four, together, rtol=1e-9, atol=1e-9) == (kind != "batch")


def check_no_sample_is_alone(make: MakeNormalised) -> None:
    """A single last sample is normalised with those before it: its logits are its own, whatever the batch size."""
    learner, rows = trained(make, "batch"), STREAM.tasks[0].train
    for size, count in ((8, 9), (7, 22), (1, 3)):
        last = [to_numpy(learner.logits(np.r_[rows[: count - 1], row], size))[-1, 0] for row in rows[count : count + 2]]
        assert np.abs(last[0] - last[1]).max() > 1e-6
        for mode in ("empirical", "published"):
            batches = list(learner.taps(0, rows[:count], size, mode, np.random.default_rng(0)))
            sizes = [tap["fc1"].inputs.shape[0] for tap in batches]
            assert sum(sizes) == count
            assert min(sizes) > 1
    learner, last_alone = trained(make, "running"), rows[:9]
    assert [size for size, _ in learner.batch_statistics(last_alone, 8)] == [9]


def check_what_has_no_batch_statistics_is_refused(make: MakeNormalised) -> None:
    """A step on one sample, and a task with one."""
    training = Training(Annealed(0.05, 1), Annealed(0.05, 1), batch_size=1)
    one = replace(STREAM, tasks=(replace(STREAM.tasks[0], test=STREAM.tasks[0].test[:1]),))
    for kind in ("batch", "running"):
        with pytest.raises(BecameError, match=r"^the batch size is 1, and the network normalises by statistics over"):
            learn(make(normalised(kind), STREAM), STREAM, build_method("finetune"), training)
    with pytest.raises(BecameError, match=r"and task 1 has a single test sample; give it two, or the network another"):
        make(normalised("batch"), one)
    make(normalised("running"), one)  # whose own statistics serve one
    learn(make(normalised("group"), one), one, build_method("finetune"), training)


def check_statistics_are_no_weights(make: MakeNormalised) -> None:
    """Training does not change them, taps do not speak of them, and curvature and directions are without them."""
    for kind, count in (("batch", 0), ("group", 0), ("running", 6)):
        learner = trained(make, kind)
        assert len(learner.running_statistics) == count
        assert learner.running_statistics <= set(learner.parameters())
        assert not learner.running_statistics & (learner.projectable | learner.heads[0] | learner.heads[1])
        before = numbers(learner.parameters())
        stepped(learner)
        list(learner.taps(0, STREAM.tasks[0].train[:12], 12, "published", np.random.default_rng(0)))
        after = numbers(learner.parameters())
        changed = {name for name, value in after.items() if not np.array_equal(value, before[name])}
        assert changed == set(before) - learner.running_statistics - learner.heads[1]
        training = Training(Annealed(0.05, 1), Annealed(0.05, 1), batch_size=12)
        measured = Measurement(learner, STREAM.tasks[0], training, "empirical", 0, "posterior")
        assert set(measured.mean) == set(measured.diagonal().covered()) == set(before) - learner.running_statistics
        assert float(measured.along([measured.mean]).curvature[0, 0]) > 0


def check_batches_say_their_own_statistics(make: MakeNormalised) -> None:
    """Those of the first layer are the mean and variance of what it sees; with them testing is as training."""
    learner, rows = trained(make, "running"), STREAM.tasks[0].train[:20]
    batches = [(size, numbers(part)) for size, part in learner.batch_statistics(rows, 8)]
    assert [size for size, _ in batches] == [8, 8, 4]
    assert all(set(part) == learner.running_statistics for _, part in batches)
    theta = numbers(learner.parameters())
    (taps,) = learner.taps(0, rows[:8], 8, "inputs", np.random.default_rng(0))
    patches = np.array(to_numpy(taps["conv1"].inputs))
    seen = patches.reshape(-1, patches.shape[-1]) @ theta["conv1.weight"].reshape(4, -1).T
    np.testing.assert_allclose(batches[0][1]["norm1.running_mean"], seen.mean(axis=0), rtol=RTOL, atol=1e-12)
    np.testing.assert_allclose(batches[0][1]["norm1.running_var"], seen.var(axis=0), rtol=RTOL)
    # With statistics of its own batch an image is seen in testing as in that batch.
    batch = make(normalised("batch"), STREAM)
    batch.assign(weights_of(learner))
    learner.assign(learner.parameters() | dict(next(iter(learner.batch_statistics(rows, 8)))[1]))
    expected = to_numpy(batch.logits(rows[:8], 8))
    np.testing.assert_allclose(to_numpy(learner.logits(rows[:8], 4)), expected, rtol=1e-8, atol=1e-8)


def check_every_model_of_a_run_has_its_own_statistics(make: MakeNormalised) -> None:
    """theta_gp, the best of a stage, the merged: those of its weights; and a run goes on from between two epochs."""
    patient = Patience(0.05, epochs=3)
    training = Training(patient, replace(patient, restores_best=False), batch_size=12)
    method, states = build_method("became-half"), list[RunState]()
    learner = make(normalised("running"), STREAM)
    record = learn(learner, STREAM, method, training, callbacks=[Listening(keep=states.append)])
    middle = next(state for state in states if state.theta_gp is not None)
    assert middle.theta_gp is not None
    assert middle.stage is not None
    models = {"merged": learner.parameters(), "theta_gp": middle.theta_gp}
    for theta in models.values():
        other = make(normalised("running"), STREAM)
        weights = {name: value for name, value in theta.items() if name not in other.running_statistics}
        move_to(other, weights, STREAM.tasks[1:], 12, 0)
        found = numbers(other.parameters())
        for name in other.running_statistics:
            np.testing.assert_allclose(to_numpy(theta[name]), found[name], rtol=RTOL, atol=1e-12)
    assert any(
        not np.allclose(to_numpy(models["merged"][name]), to_numpy(models["theta_gp"][name]))
        for name in learner.running_statistics
    )
    again = make(normalised("running"), STREAM)
    resumed = learn(again, STREAM, method, training, state=middle)
    np.testing.assert_array_equal(resumed.accuracy, record.accuracy)
    for name, value in numbers(again.parameters()).items():
        np.testing.assert_allclose(value, to_numpy(models["merged"][name]), rtol=1e-9, atol=1e-12)


def check_a_path_is_measured_between_models_with_their_own_statistics(make: MakeNormalised) -> None:
    """The true loss at both ends is that of theta_gp and theta_hat as they were, and its slopes lead to alpha."""
    training = Training(Annealed(0.05, 3), Annealed(0.1, 3), batch_size=12, path_alphas=(0.0, 1.0))
    states = list[RunState]()
    learner = make(normalised("running"), STREAM)
    record = learn(learner, STREAM, build_method("became"), training, callbacks=[Listening(keep=states.append)])
    assert record.alpha[1] is not None
    assert 0 <= record.alpha[1] <= 1
    last = [state for state in states if state.theta_gp is not None][-1]
    assert last.theta_gp is not None
    (path,) = record.paths
    weights = {name: value for name, value in last.theta.items() if name not in learner.running_statistics}
    for point, theta in zip(path.points, (last.theta_gp, weights), strict=True):
        move_to(learner, {n: theta[n] for n in weights}, STREAM.tasks[1:], 12, 0)
        expected = sum(mean_loss(learner, task.index, task.train, 12) for task in STREAM.tasks)
        np.testing.assert_allclose(point.loss, expected, rtol=1e-9)


CHECKS: list[Callable[[MakeNormalised], None]] = [
    check for name, check in sorted(globals().items()) if name.startswith("check_")
]
