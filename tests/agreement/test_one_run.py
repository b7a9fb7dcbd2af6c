"""One run on every framework in one process: three tasks of Split-MNIST in float64, from the same weights.

On a fully connected network, which the reference in NumPy can run as well; and on a convolutional one with batch norm,
dropout and a residual block. Everything but the arithmetic's last bits must agree: accuracies to the sample, losses,
alpha, weights and the memory's ranks.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.benchmarks.mnist import load_mnist
from adapters.networks import (
    Architecture,
    AveragePool,
    BatchNorm,
    Convolution,
    Dropout,
    Flatten,
    Linear,
    MaxPool,
    ReLU,
    Residual,
    mlp,
)
from became_core.continual import (
    Adam,
    Adaptation,
    Annealed,
    EpochEnd,
    Learner,
    RelativeRates,
    RunRecord,
    Segments,
    TaskEnd,
    TaskStream,
    Training,
    Watch,
    build_method,
    find_segments,
    learn,
    measured_on,
    split_classes,
)
from reference.learner import ReferenceLearner
from tests.agreement.frameworks import FRAMEWORKS
from tests.backends import to_numpy
from tests.compilers import optimised
from tests.listening import Listening

TRAINING = Training(Annealed(lr=0.1, epochs=3), Annealed(lr=0.1, epochs=2), batch_size=25, curvature_samples=100)
# At this rate the last merge is between the two models: at an end, it says nothing of how alpha was found.
GENTLE = replace(TRAINING, stage1=Annealed(lr=0.05, epochs=3), stage2=Annealed(lr=0.05, epochs=2))
METHODS = ("became", "became-paper", "became+sgp", "trgp", "ewc")
SHAPE = (1, 28, 28)
BLOCK = Residual(
    (Convolution("block.conv", 8, 3, stride=2, padding=1), BatchNorm("block.bn"), ReLU(), Dropout(0.1)),
    (Convolution("block.shortcut", 8, 1, stride=2),),
)
CONVOLUTIONAL = Architecture(
    (
        *(Convolution("conv1", 6, 5, stride=2), BatchNorm("bn1"), ReLU(), Dropout(0.1), MaxPool(2)),
        *(BLOCK, ReLU(), AveragePool(3), Flatten(), Linear("fc1", 20, bias=True), BatchNorm("bn2"), ReLU()),
    ),
    SHAPE,
)


@cache
def stream() -> TaskStream:
    return split_classes(load_mnist(), 5).first(3)


@cache
def short_stream() -> TaskStream:
    tasks = tuple(replace(task, train=task.train[:200], test=task.test[:100]) for task in stream().tasks)
    return replace(stream(), tasks=tasks)


THRESHOLD = {"threshold": 0.9}
Run = tuple[RunRecord, list[float], dict[str, NDArray[Any]]]


def run(
    learner: Learner,
    tasks: TaskStream,
    method: str,
    training: Training = TRAINING,
    settings: Mapping[str, Any] = THRESHOLD,
) -> Run:
    """The record, the mean loss of every epoch, and the final weights."""
    losses: list[float] = []

    def observe(event: EpochEnd | TaskEnd) -> None:
        if isinstance(event, EpochEnd):
            losses.append(event.loss)

    record = learn(learner, tasks, build_method(method, settings), training, callbacks=[Listening(observe)])
    return record, losses, {name: np.array(to_numpy(value)) for name, value in learner.parameters().items()}


def assert_equal(found: Run, expected: Run) -> None:
    np.testing.assert_array_equal(found[0].accuracy, expected[0].accuracy)
    np.testing.assert_array_equal(found[0].class_incremental_accuracy, expected[0].class_incremental_accuracy)
    assert found[0].ranks == expected[0].ranks
    for ours, theirs in zip(found[0].alpha, expected[0].alpha, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    assert set(found[2]) == set(expected[2])
    for name, value in expected[2].items():
        np.testing.assert_allclose(found[2][name], value, rtol=1e-6, atol=1e-9, err_msg=name)


@cache
def reference_run(method: str) -> tuple[dict[str, NDArray[Any]], Run]:
    """The weights it began with, and the run."""
    learner = ReferenceLearner(stream(), hidden=(100, 100))
    before = learner.parameters()
    return before, run(learner, stream(), method, GENTLE)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_same_on_every_framework(method: str, framework: str) -> None:
    """One of them on JAX with what XLA's optimiser does to its programs."""
    before, expected = reference_run(method)
    last = expected[0].alpha[-1]
    assert last is None or 0 < last < 1
    learner = FRAMEWORKS[framework].learner(mlp(*SHAPE), stream(), 0)
    learner.assign({name: FRAMEWORKS[framework].array(value) for name, value in before.items()})
    with optimised() if (framework, method) == ("jax", "became") else nullcontext():
        assert_equal(run(learner, stream(), method, GENTLE), expected)


@cache
def reference_segments() -> tuple[dict[str, NDArray[Any]], TaskStream, Segments]:
    """The watcher's weights, and what it found in a stream whose tasks share a head."""
    tasks = replace(stream(), shared_head=True).first(2)
    tasks = replace(tasks, tasks=tuple(replace(task, train=task.train[:320]) for task in tasks.tasks))
    learner = FRAMEWORKS["torch"].learner(mlp(*SHAPE), tasks, 0)
    before = {name: np.array(to_numpy(value)) for name, value in learner.parameters().items()}
    return before, tasks, find_segments(learner, tasks, replace(TRAINING, batch_size=16), Watch(reservoir=128))


@pytest.mark.parametrize("framework", ["jax", "tensorflow"])
def test_a_stream_is_cut_alike_on_every_framework(framework: str) -> None:
    before, tasks, expected = reference_segments()
    learner = FRAMEWORKS[framework].learner(mlp(*SHAPE), tasks, 0)
    learner.assign({name: FRAMEWORKS[framework].array(value) for name, value in before.items()})
    found = find_segments(learner, tasks, replace(TRAINING, batch_size=16), Watch(reservoir=128))
    assert len(expected.segments) == 2
    assert found.segments == expected.segments
    for ours, theirs in zip(found.stream.tasks, expected.stream.tasks, strict=True):
        np.testing.assert_array_equal(ours.train, theirs.train)
        np.testing.assert_array_equal(ours.measured, theirs.measured)


BIASED = Architecture(
    (Flatten(), Linear("fc1", 100, bias=True), ReLU(), Linear("fc2", 100, bias=True), ReLU()),
    SHAPE,
)
BY_GROUP = replace(
    TRAINING,
    stage1=Annealed(lr=2e-3, epochs=3),
    stage2=Annealed(lr=2e-3, epochs=2),
    optimiser=Adam(weight_decay=5e-5),
    relative=RelativeRates(heads=4.0, norms=2.0, first=0.5),
)


def penalised_run(learner: Learner) -> Run:
    settings = {"threshold": 0.9, "norm_penalty": 200.0}
    return run(learner, short_stream(), "became", BY_GROUP, settings)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_rates_by_group_and_a_penalty_on_biases_are_the_same_on_every_framework(framework: str) -> None:
    reference = ReferenceLearner(short_stream(), hidden=(100, 100), bias=True)
    learner = FRAMEWORKS[framework].learner(BIASED, short_stream(), 0)
    learner.assign({name: FRAMEWORKS[framework].array(value) for name, value in reference.parameters().items()})
    assert_equal(penalised_run(learner), penalised_run(reference))


def tempered_run(learner: Learner, temper: str = "calibrated") -> Run:
    training = Training(Annealed(lr=0.02, epochs=3), Annealed(lr=0.02, epochs=2), batch_size=25, curvature_samples=100)
    return run(learner, augmented_stream(), "became", training, {"threshold": 0.9, "temper": temper, "per": "layer"})


@cache
def augmented_stream() -> TaskStream:
    """Curvature is measured on copies of training images, and calibrated on held-out ones, some with wrong labels."""
    tasks = tuple(replace(task, train=task.train[50:], validation=task.train[:50]) for task in short_stream().tasks)
    targets = short_stream().targets.copy()
    for task in tasks:
        targets[task.validation[::5]] = 1 - targets[task.validation[::5]]
    return measured_on(replace(short_stream(), tasks=tasks, targets=targets), "augmented", samples=100)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_calibrated_loss_of_augmented_samples_is_the_same_on_every_framework(framework: str) -> None:
    reference = ReferenceLearner(augmented_stream(), hidden=(100, 100))
    learner = FRAMEWORKS[framework].learner(mlp(*SHAPE), augmented_stream(), 0)
    learner.assign({name: FRAMEWORKS[framework].array(value) for name, value in reference.parameters().items()})
    assert_equal(tempered_run(learner), tempered_run(reference))


def test_a_calibrated_loss_of_augmented_samples_changes_alpha() -> None:
    found = tempered_run(ReferenceLearner(augmented_stream(), hidden=(100, 100)))[0].alpha[-1]
    plain = tempered_run(ReferenceLearner(augmented_stream(), hidden=(100, 100)), "none")[0].alpha[-1]
    assert found is not None
    assert 0 < found < 1
    assert plain is not None
    assert abs(found - plain) > 0.01


def adapted_run(learner: Learner) -> Run:
    training = replace(BY_GROUP, adaptation=Adaptation(freeze=("fc1.bias",), rank=3, scale=2.0))
    return run(learner, short_stream(), "ewc", training)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_low_rank_adapters_learn_the_same_on_every_framework(framework: str) -> None:
    """Under a penalty, which is on the effective weights."""
    reference = ReferenceLearner(short_stream(), hidden=(100, 100), bias=True)
    learner = FRAMEWORKS[framework].learner(BIASED, short_stream(), 0)
    learner.assign({name: FRAMEWORKS[framework].array(value) for name, value in reference.parameters().items()})
    assert_equal(adapted_run(learner), adapted_run(reference))


@cache
def convolutional_run(framework: str) -> Run:
    return run(FRAMEWORKS[framework].learner(CONVOLUTIONAL, short_stream(), 3), short_stream(), "became+gpm")


RUNNING = Architecture(
    (
        *(Convolution("conv1", 6, 5, stride=3), BatchNorm("bn1", running=True), ReLU(), Dropout(0.1)),
        *(Flatten(), Linear("fc1", 20), BatchNorm("bn2", running=True), ReLU()),
    ),
    SHAPE,
)


@cache
def running_run(framework: str) -> Run:
    return run(FRAMEWORKS[framework].learner(RUNNING, short_stream(), 3), short_stream(), "became")


@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name != "torch"])
def test_a_run_with_running_statistics_is_the_same_on_every_framework(framework: str) -> None:
    expected = running_run("torch")
    assert expected[0].accuracy.diagonal().mean() > 75
    assert set(expected[2]) >= {"bn1.running_mean", "bn2.running_var"}
    assert_equal(running_run(framework), expected)


@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name != "torch"])
def test_a_convolutional_networks_run_is_the_same_from_the_same_seed(framework: str) -> None:
    """Initial weights, batch statistics and dropout's masks too, of which nothing is passed from one to the other."""
    expected = convolutional_run("torch")
    assert expected[0].accuracy.diagonal().mean() > 75  # chance is 50: it learns
    assert any(0 < alpha < 1 for alpha in expected[0].alpha if alpha is not None)
    assert_equal(convolutional_run(framework), expected)


def run_across_tasks(learner: Learner) -> Run:
    training = Training(Annealed(lr=0.02, epochs=2), Annealed(lr=0.02, epochs=2), batch_size=25, curvature_samples=100)
    return run(learner, short_stream(), "became", training, {"threshold": 0.9, "precision": "across"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_calibration_across_tasks_is_the_same_on_every_framework(framework: str) -> None:
    reference = ReferenceLearner(short_stream(), hidden=(100, 100))
    learner = FRAMEWORKS[framework].learner(mlp(*SHAPE), short_stream(), 0)
    learner.assign({name: FRAMEWORKS[framework].array(value) for name, value in reference.parameters().items()})
    found, expected = run_across_tasks(learner), run_across_tasks(reference)
    assert_equal(found, expected)
    assert found[0].temperatures == pytest.approx(expected[0].temperatures, rel=1e-5)
    assert len(found[0].temperatures) == len(short_stream().tasks)
