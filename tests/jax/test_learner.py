"""The JAX learner: its agreement with the reference, what it compiles and when, and what it refuses."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from adapters.jax.learner import JaxLearner, JaxNetwork
from adapters.jax.run import build_learner
from adapters.networks import (
    Architecture,
    BatchNorm,
    Convolution,
    Dropout,
    Flatten,
    Linear,
    MaxPool,
    ReLU,
)
from became_core import BecameError
from became_core.continual import (
    SGD,
    Adam,
    Annealed,
    Learner,
    RunRecord,
    TaskStream,
    Training,
    build_method,
    learn,
)
from became_core.continual.measurement import Measurement
from became_core.curvature import FisherKind
from reference.learner import ReferenceLearner
from tests.streams import prototype_stream

ROOT = Path(__file__).parents[2]
IMAGE = (1, 6, 6)
# Batches are all of one size, since each other size is compiled by itself: 90 samples for training and 30 for testing.
TRAINING = Training(Annealed(lr=0.05, epochs=8), Annealed(lr=0.05, epochs=4), batch_size=15, projector_samples=15)


def _learn(learner: Learner, stream: TaskStream, method: str, training: Training = TRAINING) -> RunRecord:
    return learn(learner, stream, build_method(method, {"threshold": 0.8}), training)


def _pair(stream: TaskStream) -> tuple[JaxLearner, ReferenceLearner]:
    """A learner and the reference's, of the same network and weights."""
    reference = ReferenceLearner(stream, hidden=(12, 10), bias=True)
    layers = Flatten(), Linear("fc1", 12, bias=True), ReLU(), Linear("fc2", 10, bias=True), ReLU()
    learner = JaxLearner(Architecture(layers, IMAGE), stream, dtype="float64")
    learner.assign(reference.parameters())
    return learner, reference


def _of_every_layer() -> Architecture:
    """Every kind of layer."""
    convolution = Convolution("conv1", 4, 3, padding=1, bias=True), BatchNorm("bn1"), ReLU(), Dropout(0.1), MaxPool(2)
    return Architecture((*convolution, Flatten(), Linear("fc1", 24, bias=True), ReLU(), Dropout(0.1)), IMAGE)


class _Images(Architecture):
    """Images come out."""

    def __call__(self, run: Any, images: Any) -> Any:
        return images


@pytest.mark.parametrize("optimiser", [SGD(), Adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize("method", ["became", "became-paper", "ewc", "gpm", "sgp", "trgp", "joint"])
def test_a_run_in_float64_equals_the_reference_learners(method: str, optimiser: Any) -> None:
    if isinstance(optimiser, Adam) and method not in ("became", "ewc", "joint"):
        pytest.skip("Adam is tried with a method of each kind: merging, penalised, with several heads at a time")
    stream = prototype_stream()
    learner, reference = _pair(stream)
    rate = 0.05 if isinstance(optimiser, SGD) else 0.002
    training = Training(Annealed(rate, 8), Annealed(rate, 4), optimiser, batch_size=16, projector_samples=20)
    found, expected = (_learn(each, stream, method, training) for each in (learner, reference))
    np.testing.assert_array_equal(found.accuracy, expected.accuracy)
    np.testing.assert_array_equal(found.class_incremental_accuracy, expected.class_incremental_accuracy)
    for alpha, wanted in zip(found.alpha, expected.alpha, strict=True):
        assert alpha == (None if wanted is None else pytest.approx(wanted, rel=1e-6))
    assert found.ranks == expected.ranks
    theta = learner.parameters()
    for name, value in reference.parameters().items():
        np.testing.assert_allclose(np.asarray(theta[name]), value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["empirical", "true", "sampled", "batch"])
def test_fisher_of_every_kind_equals_the_reference_learners(kind: FisherKind) -> None:
    """The same labels too, where they are drawn."""
    stream = prototype_stream()
    found, expected = (
        Measurement(each, stream.tasks[1], TRAINING, kind, 3, "merge").diagonal().values for each in _pair(stream)
    )
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(found[name]), value, rtol=1e-9, atol=1e-14)


def test_a_network_of_every_layer_learns() -> None:
    """In single precision, by a method that merges and trains in a region."""
    stream = prototype_stream(tasks=2)
    record = _learn(JaxLearner(_of_every_layer(), stream), stream, "became+trgp")
    assert np.isfinite(record.accuracy[-1]).all()
    assert record.accuracy.diagonal().mean() > 60  # chance is 33


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    stream = prototype_stream(tasks=2)
    weights = []
    for seed in (3, 3, 4):
        learner = JaxLearner(_of_every_layer(), stream, seed=seed)
        learn(learner, stream, build_method("finetune"), TRAINING, seed=seed)
        weights.append(np.asarray(learner.parameters()["fc1.weight"]))
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


@pytest.mark.parametrize(("method", "updates"), [("finetune", 1), ("joint", 1), ("gpm", 3), ("ewc", 2)])
def test_nothing_but_new_constraints_is_compiled_again(
    method: str, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three tasks: a network's gradients once for each batch size and set of trained parameters."""
    traced = Counter[str]()

    def count(name: str) -> None:
        function = getattr(JaxNetwork, name).__wrapped__

        def counting(*arguments: Any) -> Any:
            traced[name] += 1
            return function(*arguments)

        monkeypatch.setattr(JaxNetwork, name, jax.jit(counting, static_argnums=0))

    count("gradients")
    count("advanced")
    layers = Convolution("conv1", 3, 3), ReLU(), Flatten(), Linear("fc1", 8, bias=True), Dropout(0.1)
    stream, training = prototype_stream(), replace(TRAINING, stage1=Annealed(0.05, 2), batch_size=16)
    _learn(JaxLearner(Architecture(layers, IMAGE), stream), stream, method, training)
    sizes = 2  # of batches: the last of an epoch is smaller
    frozen_in_later_tasks = method == "gpm"
    assert traced == {"gradients": sizes * (2 if frozen_in_later_tasks else 1), "advanced": updates}


def test_what_cannot_be_used_is_said_in_one_sentence() -> None:
    stream = prototype_stream()
    with pytest.raises(BecameError, match="JAX has no device 'quantum' here"):
        JaxLearner(_of_every_layer(), stream, device="quantum")
    with pytest.raises(BecameError, match=r"to features \[N, features\]; of 2 images it made \[2, 6, 6, 1\]"):
        JaxLearner(_Images((Flatten(),), IMAGE), stream)
    with jax.enable_x64(False), pytest.raises(BecameError, match="no float64 as it is configured; set jax_enable_x64"):
        JaxLearner(_of_every_layer(), stream, dtype="float64")


def test_it_works_where_jax_has_no_double_precision() -> None:
    stream = prototype_stream(tasks=2)
    with jax.enable_x64(False):
        learner = JaxLearner(Architecture((Flatten(), Linear("fc1", 12), ReLU()), IMAGE), stream)
        record = _learn(learner, stream, "gpm")
        assert {value.dtype.name for value in learner.parameters().values()} == {"float32"}
    assert record.accuracy.diagonal().mean() > 60  # chance is 33


def test_the_command_runs(tmp_path: Path) -> None:
    options = ["--methods", "gpm", "--first", "2", "--epochs", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-W", "error", "-m", "adapters.jax.run", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gpm-seed0" / "results.json").exists()


def test_weights_are_single_precision_unless_asked_for() -> None:
    stream = prototype_stream(tasks=2)
    learner = build_learner("mlp", stream, "auto", 0)
    _learn(learner, stream, "ewc")
    assert {value.dtype.name for value in learner.parameters().values()} == {"float32"}
