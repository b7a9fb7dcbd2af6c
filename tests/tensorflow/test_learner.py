"""The TensorFlow learner: its agreement with the reference and with PyTorch, its repeatability, its traces."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from adapters.networks import (
    Architecture,
    Flatten,
    Linear,
    ReLU,
    initial_value,
)
from adapters.tensorflow.learner import TensorFlowLearner
from adapters.tensorflow.run import build_learner
from adapters.tensorflow.traced import compiled_function
from became_core import BecameError
from became_core.continual import (
    Adam,
    Annealed,
    Learner,
    RunRecord,
    Training,
    build_method,
    learn,
)
from became_core.continual.measurement import Measurement
from became_core.curvature import FisherKind
from reference.learner import ReferenceLearner
from tests.streams import prototype_stream

TRAINING = Training(Annealed(lr=0.05, epochs=8), Annealed(lr=0.05, epochs=4), batch_size=16, projector_samples=20)
SHORT = Training(Annealed(lr=0.01, epochs=1), Annealed(lr=0.01, epochs=1), batch_size=16, projector_samples=20)


def _pair() -> tuple[TensorFlowLearner, ReferenceLearner]:
    """Learners in float64 of one network with the same weights."""
    stream = prototype_stream()
    reference = ReferenceLearner(stream, hidden=(12, 10), bias=True)
    layers = Flatten(), Linear("fc1", 12, bias=True), ReLU(), Linear("fc2", 10, bias=True), ReLU()
    learner = TensorFlowLearner(Architecture(layers, (1, 6, 6)), stream, dtype=tf.float64)
    learner.assign(reference.parameters())
    return learner, reference


class _Images(Architecture):
    """Images come out."""

    def __call__(self, run: Any, images: Any) -> Any:
        return images


def _learn(learner: Learner, method: str, training: Training = TRAINING) -> RunRecord:
    return learn(learner, prototype_stream(), build_method(method, {"threshold": 0.8}), training)


def _merged(record: RunRecord) -> list[float]:
    return [alpha for alpha in record.alpha if alpha is not None]


def _assert_equal_runs(found: RunRecord, expected: RunRecord, rtol: float) -> None:
    np.testing.assert_array_equal(found.accuracy, expected.accuracy)
    np.testing.assert_array_equal(found.class_incremental_accuracy, expected.class_incremental_accuracy)
    assert _merged(found) == pytest.approx(_merged(expected), rel=rtol)
    assert found.ranks == expected.ranks


@pytest.mark.parametrize("method", ["became", "became-paper", "ewc", "gpm", "sgp", "trgp"])
def test_a_run_in_float64_equals_the_reference_learners(method: str) -> None:
    learner, reference = _pair()
    _assert_equal_runs(_learn(learner, method), _learn(reference, method), rtol=1e-6)
    theta = learner.parameters()
    for name, value in reference.parameters().items():
        np.testing.assert_allclose(theta[name].numpy(), value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["empirical", "true", "sampled", "batch"])
def test_fisher_of_every_kind_equals_the_reference_learners(kind: FisherKind) -> None:
    """The same labels too, where they are drawn."""
    pair, task = _pair(), prototype_stream().tasks[1]
    found, expected = (Measurement(each, task, TRAINING, kind, 3, "merge").diagonal().values for each in pair)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-9, atol=1e-14)


# All methods share one trace in test_conformance.py, where batches have one size.
@pytest.mark.parametrize("method", ["became", "trgp", "hat", "joint"])
def test_the_network_is_traced_once_for_each_size_of_batch(method: str) -> None:
    """Whatever the task, the stage, the method's memory; 90 samples are batches of 16 and one of 10."""
    learner, _ = _pair()
    _learn(learner, method, SHORT)
    network: Any = learner.network
    assert network._all_gradients.experimental_get_tracing_count() == 2


def test_taps_are_traced_once_for_each_size_of_batch() -> None:
    learner, _ = _pair()
    for task in prototype_stream().tasks:
        Measurement(learner, task, TRAINING, "empirical", 3, "merge").diagonal()
    network: Any = learner.network
    assert network._one_backward_pass.experimental_get_tracing_count() == 2


def test_adam_learns_as_the_references_does() -> None:
    learner, reference = _pair()
    training = Training(Annealed(0.01, 2), Annealed(0.01, 2), optimiser=Adam(weight_decay=0.01), batch_size=16)
    _assert_equal_runs(_learn(learner, "became", training), _learn(reference, "became", training), rtol=1e-6)


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    stream = prototype_stream(channels=3, side=24, per_class=12)
    runs = []
    for seed in (3, 3, 4):
        learner = build_learner("alexnet", stream, "cpu", seed)
        learn(learner, stream, build_method("finetune"), SHORT, seed=seed)
        runs.append(learner.parameters()["fc1.weight"].numpy())
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_a_seed_names_the_same_initial_weights_as_for_every_framework() -> None:
    learner = build_learner("mlp", prototype_stream(), "cpu", 3)
    for name, value in learner.parameters().items():
        expected = initial_value(3, name, tuple(value.shape), value.shape[1])
        np.testing.assert_array_equal(value.numpy(), expected.astype(np.float32))


def test_what_cannot_be_used_is_said_in_one_sentence() -> None:
    stream = prototype_stream()
    with pytest.raises(BecameError, match="TensorFlow has no device 'quantum' here"):
        build_learner("mlp", stream, "quantum", 0)
    with pytest.raises(BecameError, match="TensorFlow has no device 'cpu:7' here"):
        build_learner("mlp", stream, "cpu:7", 0)
    with pytest.raises(BecameError, match=r"to features \[N, features\]; of 2 images it made \[2, 6, 6, 1\]"):
        TensorFlowLearner(_Images((Flatten(),), (1, 6, 6)), stream)


class _Doubling:
    """Stands for a model with a function that is compiled."""

    def twice(self, values: Any) -> Any:
        return 2 * values


def test_traces_of_many_models_bring_no_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorFlow warns of the fifth trace of five calls, and takes functions with the same code for one."""
    monkeypatch.setattr(tf.get_logger(), "propagate", True)
    for _ in range(6):
        assert compiled_function(_Doubling().twice)(tf.constant(1.5)) == 3
    assert not caplog.records
    for _ in range(6):
        tf.function(_Doubling().twice)(tf.constant(1.5))
    assert "triggered tf.function retracing" in caplog.text
