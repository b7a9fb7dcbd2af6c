"""The TensorFlow learner keeps the learner protocol's promises, on networks of each kind of layer."""

from collections.abc import Callable

import pytest

tf = pytest.importorskip("tensorflow")

from adapters.tensorflow.layers import Convolution, Flatten, Linear, Pointwise  # noqa: E402
from adapters.tensorflow.learner import TensorFlowLearner  # noqa: E402
from adapters.tensorflow.networks import Network  # noqa: E402
from became_core.continual import Learner, TaskStream  # noqa: E402
from tests.conformance import CHECKS, Make  # noqa: E402


def linear(stream: TaskStream, seed: int) -> Learner:
    channels, height, width = stream.dataset.images.shape[1:]
    layers = Flatten(), Linear("fc", 9, has_bias=True), Pointwise(tf.tanh)
    return TensorFlowLearner(Network(layers, (height, width, channels)), stream, dtype=tf.float64, seed=seed)


def convolutional(stream: TaskStream, seed: int) -> Learner:
    channels, height, width = stream.dataset.images.shape[1:]
    convolution = Convolution("conv", 4, (3, 3), (2, 2), "SAME")
    layers = convolution, Pointwise(tf.tanh), Flatten(), Linear("fc", 7, has_bias=True)
    return TensorFlowLearner(Network(layers, (height, width, channels)), stream, dtype=tf.float64, seed=seed)


@pytest.mark.parametrize("make", [linear, convolutional])
@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check: Callable[[Make], None], make: Make) -> None:
    check(make)
