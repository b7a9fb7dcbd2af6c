"""One run on every framework in one process: three tasks of Split-MNIST in float64, from the same weights.

Split-MNIST on a fully connected network, which the reference in NumPy can run as well. Everything but the arithmetic's
last bits must agree: accuracies to the sample, alpha, weights and the memory's ranks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
tf = pytest.importorskip("tensorflow")

from adapters.data.mnist import load_mnist  # noqa: E402
from adapters.jax.learner import JaxLearner  # noqa: E402
from adapters.jax.networks import build_backbone as build_jax  # noqa: E402
from adapters.tensorflow.learner import TensorFlowLearner  # noqa: E402
from adapters.tensorflow.networks import build_network as build_tensorflow  # noqa: E402
from adapters.torch.learner import TorchLearner  # noqa: E402
from adapters.torch.networks import build_backbone as build_torch  # noqa: E402
from became_core.continual import (  # noqa: E402
    Annealed,
    Learner,
    MethodSettings,
    RunRecord,
    Training,
    build_method,
    learn,
    split_classes,
)
from reference.learner import ReferenceLearner  # noqa: E402
from tests.backends import load, to_numpy  # noqa: E402

TRAINING = Training(Annealed(lr=0.1, epochs=3), Annealed(lr=0.1, epochs=2), batch_size=25, curvature_samples=100)
METHODS = ("became", "became-paper", "became+sgp", "trgp", "ewc")
SHAPE = (1, 28, 28)


@cache
def stream() -> Any:
    return split_classes(load_mnist(), 5).first(3)


def _torch() -> Learner:
    return TorchLearner(build_torch("mlp", SHAPE).double(), stream(), dtype=torch.float64)


def _jax() -> Learner:
    load("jax")  # in double precision
    return JaxLearner(build_jax("mlp", SHAPE), stream(), dtype="float64")


def _tensorflow() -> Learner:
    return TensorFlowLearner(build_tensorflow("mlp", SHAPE), stream(), dtype=tf.float64)


FRAMEWORKS: dict[str, tuple[Callable[[], Learner], Callable[[NDArray[Any]], Any]]] = {
    "torch": (_torch, torch.from_numpy),
    "jax": (_jax, lambda array: jax.numpy.asarray(array)),
    "tensorflow": (_tensorflow, tf.constant),
}


@cache
def reference_run(method: str) -> tuple[RunRecord, dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The record, the weights it began with and those it ended with."""
    learner = ReferenceLearner(stream(), hidden=(100, 100))
    before = learner.parameters()
    record = learn(learner, stream(), build_method(method, MethodSettings(threshold=0.9)), TRAINING)
    return record, before, learner.parameters()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_same_on_every_framework(method: str, framework: str) -> None:
    expected, before, after = reference_run(method)
    make, array = FRAMEWORKS[framework]
    learner = make()
    learner.assign({name: array(value) for name, value in before.items()})
    found = learn(learner, stream(), build_method(method, MethodSettings(threshold=0.9)), TRAINING)
    np.testing.assert_array_equal(found.accuracy, expected.accuracy)
    np.testing.assert_array_equal(found.class_incremental_accuracy, expected.class_incremental_accuracy)
    assert found.ranks == expected.ranks
    for ours, theirs in zip(found.alpha, expected.alpha, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    theta = learner.parameters()
    assert set(theta) == set(after)
    for name, value in after.items():
        np.testing.assert_allclose(to_numpy(theta[name]), value, rtol=1e-6, atol=1e-9)
