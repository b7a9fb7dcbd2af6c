"""The three frameworks in one process, in double precision: a learner of each for a described network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
tf = pytest.importorskip("tensorflow")

from adapters.jax.learner import JaxLearner  # noqa: E402
from adapters.networks import Architecture  # noqa: E402
from adapters.tensorflow.learner import TensorFlowLearner  # noqa: E402
from adapters.torch.learner import TorchLearner  # noqa: E402
from became_core.continual import Learner, TaskStream  # noqa: E402
from tests.backends import load  # noqa: E402

__all__ = ["FRAMEWORKS", "Framework"]


@dataclass(frozen=True)
class Framework:
    """A framework's learner, given network, tasks and seed; and its arrays, given NumPy's."""

    learner: Callable[[Architecture, TaskStream, int], Learner]
    array: Callable[[NDArray[Any]], Any]


def _torch(architecture: Architecture, stream: TaskStream, seed: int) -> Learner:
    return TorchLearner(architecture, stream, dtype="float64", seed=seed)


def _jax(architecture: Architecture, stream: TaskStream, seed: int) -> Learner:
    load("jax", "cpu")  # in double precision
    return JaxLearner(architecture, stream, dtype="float64", seed=seed)


def _tensorflow(architecture: Architecture, stream: TaskStream, seed: int) -> Learner:
    return TensorFlowLearner(architecture, stream, dtype="float64", seed=seed)


FRAMEWORKS = {
    "torch": Framework(_torch, torch.tensor),
    "jax": Framework(_jax, lambda array: jax.numpy.asarray(array)),
    "tensorflow": Framework(_tensorflow, tf.constant),
}
