"""The backbones of the published protocol, and the layers' shapes against what they compute."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from adapters.tensorflow.layers import Convolution, Dropout, Flatten, MaxPool, Pointwise  # noqa: E402
from adapters.tensorflow.networks import Network, build_network  # noqa: E402
from became_core import BecameError  # noqa: E402


def test_alexnet_has_the_published_layers_and_size() -> None:
    network = build_network("alexnet", (3, 32, 32))
    shapes = network.parameters
    assert shapes["conv1.weight"] == (64, 3, 4, 4)
    assert shapes["conv2.weight"] == (128, 64, 3, 3)
    assert shapes["conv3.weight"] == (256, 128, 2, 2)
    assert shapes["fc1.weight"] == (2048, 1024)
    assert shapes["fc2.weight"] == (2048, 2048)
    assert not any(name.endswith("bias") for name in shapes if not name.startswith("bn"))
    sizes = [int(np.prod(shape)) for shape in (*shapes.values(), (100, network.width))]
    assert round(sum(sizes) / 1e6, 1) == 6.7


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_layers_say_what_shape_they_give(padding: str, side: int, strides: tuple[int, int]) -> None:
    images = tf.reshape(tf.range(2 * side * 8 * 3, dtype=tf.float32), (2, side, 8, 3))
    pooled = MaxPool((2, 3), strides, padding)  # type: ignore[arg-type]
    convolved = Convolution("conv", 5, (2, 3), strides, padding)  # type: ignore[arg-type]
    weight = tf.random.stateless_normal((5, 3, 2, 3), seed=(0, 0))
    outputs = convolved.applied({"conv.weight": weight}, images)
    assert outputs.shape[1:] == convolved.output_shape((side, 8, 3))
    assert pooled.applied(images).shape[1:] == pooled.output_shape((side, 8, 3))
    by_patches = convolved.seen(images) @ tf.transpose(tf.reshape(weight, (5, -1)))
    np.testing.assert_allclose(tf.reshape(outputs, by_patches.shape), by_patches, rtol=1e-4, atol=1e-3)


def test_images_are_flattened_channel_by_channel() -> None:
    images = np.arange(24).reshape(1, 2, 3, 4)  # N, C, H, W
    flat = Flatten().applied(tf.constant(np.moveaxis(images, 1, -1)))
    np.testing.assert_array_equal(flat, images.reshape(1, -1))


def test_dropout_keeps_the_right_fraction_and_the_mean_and_only_in_training() -> None:
    network = Network((Flatten(), Dropout(round(0.2 * 2**16))), (20, 50, 1))
    images = tf.ones((200, 20, 50, 1), tf.float64)
    (mask,) = network.masks(200, np.random.default_rng(0))
    dropped = network.features({}, images, [mask]).numpy()
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 1.25], abs=1e-4)
    assert abs((dropped == 0).mean() - 0.2) < 5e-3
    assert abs(dropped.mean() - 1) < 1e-2
    np.testing.assert_array_equal(network.features({}, images), np.ones((200, 1000)))
    (again,), (other,) = (network.masks(200, np.random.default_rng(seed)) for seed in (0, 1))
    assert np.array_equal(mask, again)
    assert not np.array_equal(mask, other)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("vgg", (3, 32, 32), "no network 'vgg'; choose from alexnet, mlp"), ("alexnet", (1, 21, 28), "at least 22x22")],
)
def test_unknown_networks_and_small_images_are_named(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(BecameError, match=message):
        build_network(name, shape)


def test_a_backbone_must_end_in_features() -> None:
    with pytest.raises(BecameError, match=r"must map images \[N, C, H, W\] to features \[N, features\]"):
        Network((Pointwise(tf.nn.relu),), (6, 6, 1))


def test_alexnet_takes_the_smallest_images_it_promises() -> None:
    assert build_network("alexnet", (3, 22, 22)).parameters["fc1.weight"] == (2048, 256)
