"""What each described layer computes in TensorFlow, and what it gives a tap.

Convention: images are [N, H, W, C] here, TensorFlow's convolutions having no other kernel on a CPU; parameters have
their canonical layouts (OIHW, [out, in]) and are turned where they are used.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import tensorflow as tf

from adapters import networks
from adapters.networks import (
    GELU,
    AveragePool,
    BatchNorm,
    CausalAttention,
    Convolution,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    LastPosition,
    Latent,
    LayerNorm,
    Linear,
    MaxPool,
    Positions,
    ReLU,
    Tanh,
    Tapped,
)
from became_core.arrays import Array

__all__ = ["Pass", "Patches", "convolved", "with_positions"]


def with_positions(array: Array) -> Array:
    """Return [N, ..., d] as [N, positions, d]."""
    return tf.reshape(array, (-1, prod(array.shape[1:-1]), array.shape[-1]))


def _linear(run: "Pass", layer: Linear, inputs: Array) -> Array:
    a, weight = run.lowered(inputs, run.weights[f"{layer.name}.weight"])
    return run.tapped(layer, lambda: inputs, tf.cast(tf.matmul(a, weight, transpose_b=True), inputs.dtype))


def _convolution(run: "Pass", layer: Convolution, inputs: Array) -> Array:
    padded, pair = _padded(layer, inputs), (layer.stride, layer.stride)
    return convolved(run, layer, padded, kernel=(layer.kernel, layer.kernel), strides=pair)


def convolved(
    run: "Pass",
    layer: Tapped,
    inputs: Array,
    *,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: str = "VALID",
    rates: tuple[int, int] = (1, 1),
) -> Array:
    """Return the output of a convolution of images, recorded with its patches.

    Args:
        run: has the layer's weight.
        layer: what its tap tells of it.
        inputs: [N, H, W, C].
        kernel: height and width of the windows.
        strides: how far they are apart.
        padding: as TensorFlow calls it.
        rates: how far a window's pixels are apart.
    """
    weight = tf.transpose(run.weights[f"{layer.name}.weight"], (2, 3, 1, 0))
    output = tf.nn.conv2d(*run.lowered(inputs, weight), strides, padding, dilations=rates)
    return run.tapped(layer, Patches(inputs, kernel, strides, padding, rates), tf.cast(output, inputs.dtype))


@dataclass(frozen=True)
class Patches:
    """What each output position of a convolution sees; arguments as of ``convolved``."""

    images: Array
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: str
    rates: tuple[int, int]

    @property
    def slide_by_one(self) -> bool:
        """Whether they are all windows of the images as they are, a step of one apart."""
        return self.padding == "VALID" and self.strides == (1, 1) and self.rates == (1, 1)

    def __call__(self) -> Array:
        """Return them, [N, positions, channels x kernel], as the weight is flattened."""
        window = ((1, *pair, 1) for pair in (self.kernel, self.strides, self.rates))
        patches = tf.image.extract_patches(self.images, *window, self.padding)
        positions, channels, places = prod(patches.shape[1:3]), self.images.shape[-1], prod(self.kernel)
        apart = tf.reshape(patches, (-1, positions, places, channels))
        return tf.reshape(tf.transpose(apart, (0, 1, 3, 2)), (-1, positions, channels * places))


def _padded(layer: Convolution, inputs: Array) -> Array:
    """Return images as a convolution sees them."""
    around = (layer.padding, layer.padding)
    return tf.pad(inputs, ((0, 0), around, around, (0, 0))) if layer.padding else inputs


def _batch_norm(run: "Pass", layer: BatchNorm, inputs: Array) -> Array:
    axes = list(range(len(inputs.shape) - 1))
    mean, variance = run.statistics(layer, lambda: tf.nn.moments(inputs, axes))
    if run.constant_statistics:
        mean, variance = tf.stop_gradient(mean), tf.stop_gradient(variance)
    # One multiplication of all inputs less than by normalising them first, which only taps ask for.
    weight = run.weights[f"{layer.name}.weight"]
    outputs = tf.nn.batch_normalization(inputs, mean, variance, None, weight, layer.epsilon)
    return run.tapped(layer, lambda: (inputs - mean) * tf.math.rsqrt(variance + layer.epsilon), outputs)


def _group_norm(run: "Pass", layer: GroupNorm, inputs: Array) -> Array:
    *places, channels = inputs.shape[1:]
    groups = layer.groups(channels)
    apart = tf.reshape(inputs, (-1, prod(places), groups, channels // groups))
    mean, variance = tf.nn.moments(apart, [1, 3], keepdims=True)
    normalised = tf.reshape((apart - mean) * tf.math.rsqrt(variance + layer.epsilon), (-1, *places, channels))
    return run.tapped(layer, lambda: normalised, normalised * run.weights[f"{layer.name}.weight"])


def _layer_norm(run: "Pass", layer: LayerNorm, inputs: Array) -> Array:
    mean, variance = tf.nn.moments(inputs, [-1], keepdims=True)
    normalised = (inputs - mean) * tf.math.rsqrt(variance + layer.epsilon)
    return run.tapped(layer, lambda: normalised, normalised * run.weights[f"{layer.name}.weight"])


def _embedding(run: "Pass", layer: Embedding, inputs: Array) -> Array:
    return run.tapped(layer, lambda: inputs, tf.gather(run.weights[f"{layer.name}.weight"], inputs))


def _positions(run: "Pass", layer: Positions, inputs: Array) -> Array:
    numbers = tf.broadcast_to(tf.range(inputs.shape[1]), tf.shape(inputs)[:2])
    return inputs + run.tapped(layer, lambda: numbers, tf.gather(run.weights[f"{layer.name}.weight"], numbers))


def _attention(run: "Pass", layer: CausalAttention, inputs: Array) -> Array:  # noqa: ARG001 - a table's signature
    length, width = inputs.shape[1:]
    q, k, v = tf.unstack(tf.reshape(inputs, (-1, length, 3, layer.heads, width // 3 // layer.heads)), axis=2)
    scores = tf.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
    # Not a select: of -inf times 0 the forward-mode derivative would be no number.
    beyond = 1 - tf.linalg.band_part(tf.ones((length, length), inputs.dtype), -1, 0)
    weights = tf.nn.softmax(scores - 1e9 * beyond)
    return tf.reshape(tf.einsum("nhqk,nkhd->nqhd", weights, v), (-1, length, width // 3))


def _gelu(inputs: Array) -> Array:
    # TensorFlow's own has the root of two in single precision alone, whatever the inputs' dtype.
    return inputs * (0.5 * (1 + tf.math.erf(inputs * 0.5**0.5)))


def _dropout(run: "Pass", layer: Dropout, inputs: Array) -> Array:
    keep = run.mask(layer)
    return inputs if keep is None else inputs * (tf.cast(keep, inputs.dtype) * layer.scale)


def _latent(run: "Pass", layer: Latent, inputs: Array) -> Array:  # noqa: ARG001 - a table's signature
    mean, log_variance, noise = run.latent(inputs)
    return mean + tf.exp(log_variance / 2) * noise


def _flattened(inputs: Array) -> Array:
    axes = range(1, len(inputs.shape))
    channels_first = tf.transpose(inputs, (0, axes[-1], *axes[:-1]))
    return tf.reshape(channels_first, (-1, prod(inputs.shape[1:])))


class Pass(networks.Pass):
    """One run of a network."""

    def lowered(self, *arrays: Array) -> tuple[Array, ...]:
        """Return what is multiplied in the dtype of products."""
        return arrays if self.products is None else tuple(tf.cast(array, self.products) for array in arrays)

    computed: ClassVar = {
        Linear: _linear,
        Convolution: _convolution,
        BatchNorm: _batch_norm,
        GroupNorm: _group_norm,
        LayerNorm: _layer_norm,
        Embedding: _embedding,
        Positions: _positions,
        CausalAttention: _attention,
        GELU: lambda run, layer, inputs: _gelu(inputs),
        ReLU: lambda run, layer, inputs: tf.nn.relu(inputs),
        Tanh: lambda run, layer, inputs: tf.tanh(inputs),
        Dropout: _dropout,
        MaxPool: lambda run, layer, inputs: tf.nn.max_pool2d(inputs, layer.size, layer.size, "VALID"),
        AveragePool: lambda run, layer, inputs: tf.nn.avg_pool2d(inputs, layer.size, layer.size, "VALID"),
        Latent: _latent,
        LastPosition: lambda run, layer, inputs: inputs[:, -1],
        Flatten: lambda run, layer, inputs: _flattened(inputs),
    }
