"""What layers compute, and give a tap, in JAX."""

from typing import Any

import jax
import numpy as np
import pytest

from adapters.jax.layers import Pass
from adapters.jax.learner import JaxLearner
from adapters.networks import (
    Architecture,
    AveragePool,
    Convolution,
    Flatten,
    Linear,
    MaxPool,
    alexnet,
    draw_masks,
    initial_values,
)
from became_core import BecameError
from tests.compilers import compiled
from tests.streams import prototype_stream


def test_what_pooling_leaves_over_is_not_looked_at() -> None:
    images = jax.numpy.asarray(np.arange(5 * 7, dtype=np.float64).reshape(1, 5, 7, 1))
    greatest, mean = (Pass({})(layer, images)[0, :, :, 0] for layer in (MaxPool(2), AveragePool(2)))
    np.testing.assert_array_equal(greatest, [[8, 10, 12], [22, 24, 26]])
    np.testing.assert_array_equal(mean, [[4, 6, 8], [18, 20, 22]])


def test_of_equal_pixels_the_first_has_the_gradient_of_their_maximum() -> None:
    """As PyTorch and TensorFlow have it; a maximum over axes would share it among them."""
    images = jax.numpy.asarray([[[1.0, 2.0, 0.0], [2.0, 2.0, 9.0]]])[..., None]
    gradient = jax.grad(lambda images: Pass({})(MaxPool(2), images).sum())(images)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1, 0], [0, 0, 0]])
    assert np.isnan(Pass({})(MaxPool(2), images.at[0, 0, 0].set(np.nan))).all()


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2)])
def test_a_convolution_is_its_patches_times_its_weight(stride: int, padding: int) -> None:
    layer, draw = Convolution("conv", 5, kernel=2, stride=stride, padding=padding), np.random.default_rng(0)
    weight = jax.numpy.asarray(draw.normal(size=(5, 3, 2, 2)))
    images = jax.numpy.asarray(draw.normal(size=(2, 6, 7, 3)))
    patches = []

    def record(_: Any, inputs: Any, output: Any) -> Any:
        patches.append(inputs())
        return output

    found = Pass({"conv.weight": weight}, record=record)(layer, images)
    assert found.shape[1:] == (*layer.output_shape((3, 6, 7))[1:], 5)
    np.testing.assert_allclose(found, patches[0] @ weight.reshape(5, -1).T, atol=1e-12)


def test_images_are_flattened_channel_by_channel() -> None:
    images = np.arange(24).reshape(1, 2, 3, 4)  # N, C, H, W
    flat = Pass({})(Flatten(), jax.numpy.asarray(np.moveaxis(images, 1, -1)))
    np.testing.assert_array_equal(flat, images.reshape(1, -1))


class Twice(Architecture):
    """The last layer runs a second time."""

    def __call__(self, run: Any, images: Any) -> Any:
        return run(self.layers[-1], super().__call__(run, images))


def test_a_layer_that_runs_twice_is_refused() -> None:
    with pytest.raises(BecameError, match="the layer 'fc1' runs twice in one pass; give each run a layer of its own"):
        JaxLearner(Twice((Flatten(), Linear("fc1", 36)), (1, 6, 6)), prototype_stream())


def test_compiled_gradients_in_single_precision_are_those_in_double() -> None:
    """A compiler may compute a number twice and not alike: a maximum that is looked for by ``==`` is then not found."""
    network, draw = alexnet(3, 22, 22), np.random.default_rng(0)
    initial, masks = initial_values(0, network.parameters), draw_masks(network.masks, 16, draw)
    images, along = draw.normal(size=(16, 22, 22, 3)), draw.normal(size=(16, network.width))

    def gradients(dtype: str) -> Any:
        def along_features(weights: Any) -> Any:
            features = network(Pass(weights, masks), jax.numpy.asarray(images, dtype))
            return (features * jax.numpy.asarray(along, dtype)).sum()

        return compiled("jax", jax.grad(along_features))({n: jax.numpy.asarray(v, dtype) for n, v in initial.items()})

    single, double = gradients("float32"), gradients("float64")
    for name, value in double.items():
        np.testing.assert_allclose(single[name], value, atol=1e-4 * float(abs(value).max()), err_msg=name)
