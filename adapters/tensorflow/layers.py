"""The layers that networks are made of: what each computes, and what it gives a tap.

Convention: images are [N, H, W, C] here, TensorFlow's convolutions having no other kernel on a CPU; parameters have
their canonical layouts (OIHW, [out, in]) and are turned where they are used. A shape is one sample's, [H, W, C] or [d].
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import tensorflow as tf

from became_core.arrays import Array, Params

__all__ = [
    "BatchNorm",
    "Convolution",
    "Dropout",
    "Flatten",
    "Layer",
    "Linear",
    "MaxPool",
    "Pointwise",
    "Shape",
    "Weighted",
    "with_positions",
]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """y = W a + b, W being [width, d]."""

    name: str
    width: int
    has_bias: bool = False

    kind: ClassVar[Literal["matrix", "scale"]] = "matrix"

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """Return the shapes of the parameters, by name, for inputs of this shape."""
        return _named(self.name, (self.width, shape[-1]), self.width if self.has_bias else 0)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return (*shape[:-1], self.width)

    def prepared(self, inputs: Array, constant: bool) -> Array:
        """Return a, what the weight acts on."""
        return inputs

    def applied(self, theta: Params, a: Array) -> Array:
        """Return the output."""
        return _shifted(tf.matmul(a, theta[f"{self.name}.weight"], transpose_b=True), theta, self.name, self.has_bias)

    def seen(self, a: Array) -> Array:
        """Return what a tap has for inputs, [N, positions, d_in]."""
        return with_positions(a)


@dataclass(frozen=True)
class Convolution:
    """A convolution by a kernel [filters, C, height, width]."""

    name: str
    filters: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: Literal["VALID", "SAME"] = "VALID"
    has_bias: bool = False

    kind: ClassVar[Literal["matrix", "scale"]] = "matrix"

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """Return the shapes of the parameters, by name, for inputs of this shape."""
        return _named(self.name, (self.filters, shape[-1], *self.kernel), self.filters if self.has_bias else 0)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return (*_strided(shape, self.kernel, self.strides, self.padding), self.filters)

    def prepared(self, inputs: Array, constant: bool) -> Array:
        """Return a, what the weight acts on."""
        return inputs

    def applied(self, theta: Params, a: Array) -> Array:
        """Return the output."""
        kernel = tf.transpose(theta[f"{self.name}.weight"], (2, 3, 1, 0))
        return _shifted(tf.nn.conv2d(a, kernel, self.strides, self.padding), theta, self.name, self.has_bias)

    def seen(self, a: Array) -> Array:
        """Return the patches, [N, positions, C x height x width], as the weight is flattened."""
        height, width = self.kernel
        sizes, strides = (1, height, width, 1), (1, *self.strides, 1)
        patches = tf.image.extract_patches(a, sizes, strides, (1, 1, 1, 1), self.padding)
        positions, channels = patches.shape[1] * patches.shape[2], a.shape[-1]
        apart = tf.reshape(patches, (-1, positions, height * width, channels))
        return tf.reshape(tf.transpose(apart, (0, 1, 3, 2)), (-1, positions, channels * height * width))


@dataclass(frozen=True)
class BatchNorm:
    """y = w a + b, a being the inputs normalised by the batch's own mean and biased variance; none are kept."""

    name: str
    epsilon: float = 1e-5

    kind: ClassVar[Literal["matrix", "scale"]] = "scale"
    has_bias: ClassVar[bool] = True

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """Return the shapes of the parameters, by name, for inputs of this shape."""
        return _named(self.name, (shape[-1],), shape[-1])

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape

    def prepared(self, inputs: Array, constant: bool) -> Array:
        """Return the normalised inputs; if asked, with statistics that no gradient passes through."""
        mean, variance = tf.nn.moments(inputs, list(range(len(inputs.shape) - 1)))
        if constant:
            mean, variance = tf.stop_gradient(mean), tf.stop_gradient(variance)
        scale = tf.math.rsqrt(variance + self.epsilon)
        return inputs * scale - mean * scale

    def applied(self, theta: Params, a: Array) -> Array:
        """Return the output."""
        return a * theta[f"{self.name}.weight"] + theta[f"{self.name}.bias"]

    def seen(self, a: Array) -> Array:
        """Return what a tap has for inputs, [N, positions, C]."""
        return with_positions(a)


@dataclass(frozen=True)
class Pointwise:
    """A function of each element, without parameters."""

    function: Callable[[Array], Array]

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape

    def applied(self, inputs: Array) -> Array:
        """Return the output."""
        return self.function(inputs)


@dataclass(frozen=True)
class MaxPool:
    """The maximum of each window; what is left over at the edges is dropped, or padded if so asked."""

    size: tuple[int, int]
    strides: tuple[int, int]
    padding: Literal["VALID", "SAME"] = "VALID"

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return (*_strided(shape, self.size, self.strides, self.padding), shape[-1])

    def applied(self, inputs: Array) -> Array:
        """Return the output."""
        return tf.nn.max_pool2d(inputs, self.size, self.strides, self.padding)


@dataclass(frozen=True)
class Flatten:
    """Each sample as one row, its images in the order C, H, W: that of the canonical weights behind it."""

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return (prod(shape),)

    def applied(self, inputs: Array) -> Array:
        """Return the output."""
        axes = range(1, len(inputs.shape))
        channels_first = tf.transpose(inputs, (0, axes[-1], *axes[:-1]))
        return tf.reshape(channels_first, (-1, prod(inputs.shape[1:])))


@dataclass(frozen=True)
class Dropout:
    """Zero each element with probability p and scale the rest by 1 / (1 - p), by masks that are drawn beforehand.

    Attributes:
        threshold: 2^16 p, an integer, as ``adapters.tensorflow.networks.Network.masks`` draws.
    """

    threshold: int

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape

    def applied(self, inputs: Array, keep: Array) -> Array:
        """Return the output, given which elements are kept, booleans of the same shape."""
        return inputs * (tf.cast(keep, inputs.dtype) * (1 / (1 - self.threshold / 2**16)))


Weighted = Linear | Convolution | BatchNorm
Layer = Weighted | Pointwise | MaxPool | Flatten | Dropout


def with_positions(array: Array) -> Array:
    """Return [N, ..., d] as [N, positions, d]."""
    return tf.reshape(array, (-1, prod(array.shape[1:-1]), array.shape[-1]))


def _named(name: str, weight: Shape, biases: int) -> dict[str, Shape]:
    return {f"{name}.weight": weight} | ({f"{name}.bias": (biases,)} if biases else {})


def _shifted(outputs: Array, theta: Params, name: str, has_bias: bool) -> Array:
    return outputs + theta[f"{name}.bias"] if has_bias else outputs


def _strided(shape: Shape, size: tuple[int, int], strides: tuple[int, int], padding: str) -> Shape:
    """Return the height and width of what comes out of windows of a size that move by strides."""
    taken = (0, 0) if padding == "SAME" else (size[0] - 1, size[1] - 1)
    return tuple(-(-(side - less) // stride) for side, less, stride in zip(shape[:2], taken, strides, strict=True))
