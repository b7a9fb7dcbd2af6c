"""The TensorFlow learner: its agreement with the reference and with PyTorch, its repeatability, its traces."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from adapters.initial import initial_value  # noqa: E402
from adapters.tensorflow.layers import Flatten, Linear, Pointwise  # noqa: E402
from adapters.tensorflow.learner import TensorFlowLearner  # noqa: E402
from adapters.tensorflow.networks import Network, build_network  # noqa: E402
from adapters.tensorflow.run import build_learner  # noqa: E402
from became_core import BecameError  # noqa: E402
from became_core.arrays import Params  # noqa: E402
from became_core.continual import (  # noqa: E402
    METHODS,
    SGD,
    Adam,
    Annealed,
    Batch,
    Constraint,
    Learner,
    MethodSettings,
    RunRecord,
    Training,
    build_method,
    learn,
)
from became_core.continual.measurement import Measurement  # noqa: E402
from became_core.curvature import FisherKind, derivatives_along  # noqa: E402
from reference.learner import ReferenceLearner  # noqa: E402
from tests.streams import prototype_stream  # noqa: E402

TRAINING = Training(Annealed(lr=0.05, epochs=8), Annealed(lr=0.05, epochs=4), batch_size=16, projector_samples=20)
SHORT = Training(Annealed(lr=0.01, epochs=1), Annealed(lr=0.01, epochs=1), batch_size=16, projector_samples=20)


def _pair() -> tuple[TensorFlowLearner, ReferenceLearner]:
    """Learners in float64 of one network with the same weights."""
    stream = prototype_stream()
    reference = ReferenceLearner(stream, hidden=(12, 10), bias=True)
    relu = Pointwise(tf.nn.relu)
    layers = Flatten(), Linear("fc1", 12, has_bias=True), relu, Linear("fc2", 10, has_bias=True), relu
    learner = TensorFlowLearner(Network(layers, (6, 6, 1)), stream, dtype=tf.float64)
    learner.assign(reference.parameters())
    return learner, reference


def _learn(learner: Learner, method: str, training: Training = TRAINING) -> RunRecord:
    return learn(learner, prototype_stream(), build_method(method, MethodSettings(threshold=0.8)), training)


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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_network_is_traced_once_for_each_size_of_batch(method: str) -> None:
    """Whatever the task, the stage, the method's memory; 90 samples are batches of 16 and one of 10."""
    learner, _ = _pair()
    _learn(learner, method, SHORT)
    assert learner.traces == 2


def test_adam_learns_as_the_references_does() -> None:
    learner, reference = _pair()
    training = Training(Annealed(0.01, 2), Annealed(0.01, 2), optimiser=Adam(weight_decay=0.01), batch_size=16)
    _assert_equal_runs(_learn(learner, "became", training), _learn(reference, "became", training), rtol=1e-6)


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    stream = prototype_stream(channels=3, side=24, per_class=12)
    runs = []
    for seed in (3, 3, 4):
        learner = build_learner("alexnet", stream, "cpu", seed)
        learn(learner, stream, build_method("finetune", MethodSettings()), SHORT, seed=seed)
        runs.append(learner.parameters()["fc1.weight"].numpy())
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_alexnet_learns_as_pytorchs_does() -> None:
    """Given the same weights: convolution, batch norm, pooling, and dropout with the same masks; all measurements."""
    pytest.importorskip("torch")
    import torch

    from adapters.torch.learner import TorchLearner
    from adapters.torch.networks import build_backbone

    stream = prototype_stream(tasks=2, channels=3, side=22, per_class=12)
    learner = TensorFlowLearner(build_network("alexnet", (3, 22, 22)), stream, dtype=tf.float64)
    theirs = TorchLearner(build_backbone("alexnet", (3, 22, 22)).double(), stream, dtype=torch.float64)
    assert learner.projectable == theirs.projectable

    def as_torch(parameters: Params) -> Params:
        return {name: torch.from_numpy(value.numpy()) for name, value in parameters.items()}

    theirs.assign(as_torch(learner.parameters()))
    rows = stream.tasks[0].test
    np.testing.assert_allclose(learner.logits(rows, 5).numpy(), theirs.logits(rows, 5).numpy(), rtol=1e-9, atol=1e-12)

    direction = {name: 0.1 * (value + 0.01) for name, value in learner.parameters().items()}
    found, expected = (
        derivatives_along(each.pushforward(0, rows, 5, [along]))
        for each, along in ((learner, direction), (theirs, as_torch(direction)))
    )
    for ours, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), other.numpy(), rtol=1e-9)

    batches = [Batch(0, stream.tasks[0].train[start : start + 10]) for start in (0, 10, 20)]
    losses = [
        each.train(
            batches, np.full(3, 0.05), Constraint(frozenset(each.parameters())), SGD(), np.random.default_rng(1)
        ).loss
        for each in (learner, theirs)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    fishers = [
        [
            Measurement(each, stream.tasks[0], SHORT, kind, 0, "merge").diagonal().values
            for kind in ("empirical", "batch")
        ]
        for each in (learner, theirs)
    ]
    for ours, other in zip((learner.parameters(), *fishers[0]), (theirs.parameters(), *fishers[1]), strict=True):
        for name, value in ours.items():
            np.testing.assert_allclose(value.numpy(), other[name].numpy(), rtol=1e-6, atol=1e-12, err_msg=name)


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
    with pytest.raises(BecameError, match=r"the backbone must map images \[N, C, H, W\] to features"):
        Network((Pointwise(tf.tanh),), (6, 6, 1))
