"""The three frameworks in one process, in double precision: a learner of each for a described network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
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
from became_core.continual.data import Indices  # noqa: E402
from became_core.continual.evaluation import accuracies  # noqa: E402
from became_core.curvature import derivatives_along, input_grams  # noqa: E402
from tests.backends import load, to_numpy  # noqa: E402

__all__ = ["FRAMEWORKS", "Framework", "measured_by_all", "rng"]


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


def rng() -> np.random.Generator:
    """Return a new generator, the same each time."""
    return np.random.default_rng(11)


def measured_by_all(learner: Learner, stream: TaskStream, rows: Indices) -> dict[str, Any]:
    """Return what must agree whatever a network is for, by name: Gram matrices, derivatives along a way, and losses."""
    outcome: dict[str, Any] = {}
    grams = input_grams(learner.taps(0, rows, 5, "inputs", rng()), learner.projectable)
    for name, gram in grams.items():
        whole = np.asarray(to_numpy(gram))
        outcome[f"Gram matrix of {name}"] = whole if whole.shape[0] == whole.shape[1] else whole.T @ whole
    direction = {name: 0.1 * (value + 0.5) for name, value in learner.parameters().items()}
    along = derivatives_along(learner.pushforward(0, rows, 3, [direction]), learner.likelihood)
    outcome |= {f"derivative {order}": value for order, value in enumerate(along)}
    outcome["losses"] = np.array(accuracies(learner, stream.tasks, 3).loss)
    return outcome
