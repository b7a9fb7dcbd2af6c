"""What layers compute, and give a tap, in TensorFlow."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from adapters.networks import (
    Architecture,
    AveragePool,
    Convolution,
    Dropout,
    Flatten,
    Linear,
    MaxPool,
)
from adapters.tensorflow.layers import Pass
from adapters.tensorflow.learner import TensorFlowLearner
from became_core import BecameError
from tests.streams import prototype_stream


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2)])
def test_a_convolution_is_its_patches_times_its_weight(stride: int, padding: int, side: int) -> None:
    layer, draw = Convolution("conv", 5, kernel=2, stride=stride, padding=padding), np.random.default_rng(0)
    weight = tf.constant(draw.normal(size=(5, 3, 2, 2)))
    images = tf.constant(draw.normal(size=(2, side, 8, 3)))
    patches = []

    def record(_: Any, inputs: Any, output: Any) -> Any:
        patches.append(inputs())
        return output

    found = Pass({"conv.weight": weight}, record=record)(layer, images)
    assert found.shape[1:] == (*layer.output_shape((3, side, 8))[1:], 5)
    by_patches = patches[0] @ tf.transpose(tf.reshape(weight, (5, -1)))
    np.testing.assert_allclose(tf.reshape(found, by_patches.shape), by_patches, atol=1e-12)


def test_what_pooling_leaves_over_is_not_looked_at() -> None:
    images = tf.reshape(tf.range(5 * 7, dtype=tf.float64), (1, 5, 7, 1))
    greatest, mean = (Pass({})(layer, images)[0, :, :, 0] for layer in (MaxPool(2), AveragePool(2)))
    np.testing.assert_array_equal(greatest, [[8, 10, 12], [22, 24, 26]])
    np.testing.assert_array_equal(mean, [[4, 6, 8], [18, 20, 22]])


def test_images_are_flattened_channel_by_channel() -> None:
    images = np.arange(24).reshape(1, 2, 3, 4)  # N, C, H, W
    flat = Pass({})(Flatten(), tf.constant(np.moveaxis(images, 1, -1)))
    np.testing.assert_array_equal(flat, images.reshape(1, -1))


def test_dropout_keeps_what_its_mask_keeps_and_all_without_one() -> None:
    layer, inputs = Dropout(0.2), tf.ones((2, 3), tf.float64)
    keep = np.array([[True, False, True], [False, True, True]])
    np.testing.assert_allclose(Pass({}, [keep])(layer, inputs), keep * layer.scale)
    np.testing.assert_array_equal(Pass({})(layer, inputs), inputs)


class Twice(Architecture):
    """The last layer runs a second time."""

    def __call__(self, run: Any, images: Any) -> Any:
        return run(self.layers[-1], super().__call__(run, images))


def test_a_layer_that_runs_twice_is_refused() -> None:
    with pytest.raises(BecameError, match="the layer 'fc1' runs twice in one pass; give each run a layer of its own"):
        TensorFlowLearner(Twice((Flatten(), Linear("fc1", 36)), (1, 6, 6)), prototype_stream())
