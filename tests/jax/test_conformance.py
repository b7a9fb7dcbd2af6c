"""The JAX learner keeps the learner protocol's promises, on networks of each kind of layer."""

from collections.abc import Callable

import jax
import pytest

from adapters.jax.layers import Apply, Conv, Dense, Flatten
from adapters.jax.learner import JaxLearner
from adapters.jax.networks import Sequential
from became_core.continual import Learner, TaskStream
from tests.conformance import CHECKS, Make


def linear(stream: TaskStream, seed: int) -> Learner:
    pixels = stream.dataset.images[0].size
    backbone = Sequential((Flatten(), Dense("fc1", pixels, 9), Apply(jax.numpy.tanh)))
    return JaxLearner(backbone, stream, dtype="float64", seed=seed)


def convolutional(stream: TaskStream, seed: int) -> Learner:
    channels, height, width = stream.dataset.images.shape[1:]
    convolution = Conv("conv1", channels, 4, kernel=3, stride=2, padding=1, bias=False)
    places = ((height + 1) // 2) * ((width + 1) // 2)
    backbone = Sequential((convolution, Apply(jax.numpy.tanh), Flatten(), Dense("fc1", 4 * places, 7)))
    return JaxLearner(backbone, stream, dtype="float64", seed=seed)


@pytest.mark.parametrize("make", [linear, convolutional])
@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check: Callable[[Make], None], make: Make) -> None:
    check(make)
