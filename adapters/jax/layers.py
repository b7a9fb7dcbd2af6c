"""Layers as values: what each computes from named weights, and what it gives a tap.

Convention: within a network images are [N, H, W, C]; weights are canonical, [out, in] and OIHW. A layer is hashable, so
that a network can be a static argument of what JAX compiles; all that changes lies in the ``Pass`` it runs in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, NamedTuple, Protocol

from jax import lax
from jax import numpy as jnp

from became_core import BecameError
from became_core.arrays import Array, Params

__all__ = ["Apply", "BatchNorm", "Conv", "Dense", "Dropout", "Flatten", "Layer", "MaxPool", "Pass", "Tapped"]


class Parameter(NamedTuple):
    """A parameter's shape, and how many inputs each output of its layer sees; None for a normalisation layer."""

    shape: tuple[int, ...]
    fan_in: int | None


@dataclass
class Pass:
    """One run of a network, while it is traced.

    Attributes:
        weights: by canonical name.
        mask: (shape, 2^16 p) -> a dropout layer's mask, True for what is kept; None for no dropout.
        constant_statistics: whether gradients take batch statistics for constants.
        taps: whether the layers' inputs and outputs are recorded.
        perturbations: what is added to a layer's output, by layer, [N, positions, d_out].
        inputs: recorded, arranged as ``became_core.curvature.Tap`` has them.
        outputs: recorded, [N, positions, d_out].
    """

    weights: Params
    mask: Callable[[tuple[int, ...], int], Array] | None = None
    constant_statistics: bool = False
    taps: bool = False
    perturbations: Params = field(default_factory=dict)
    inputs: Params = field(default_factory=dict)
    outputs: Params = field(default_factory=dict)

    def tapped(self, layer: "Tapped", inputs: Callable[[], Array], output: Array) -> Array:
        """Return a layer's output, biased and perturbed; record it and its inputs, if this is asked for.

        Raises:
            BecameError: if the layer runs a second time.
        """
        if layer.bias:
            output = output + self.weights[f"{layer.name}.bias"]
        if not self.taps:
            return output
        if layer.name in self.inputs:
            raise BecameError(f"the layer '{layer.name}' runs twice in one pass; give each run a layer of its own.")
        self.inputs[layer.name] = _positions(inputs())
        self.outputs[layer.name] = _positions(output)
        if layer.name in self.perturbations:
            output = output + self.perturbations[layer.name].reshape(output.shape)
        return output


def _positions(array: Array) -> Array:
    """Return [N, ..., d] as [N, positions, d]."""
    return array.reshape(array.shape[0], -1, array.shape[-1])


class Layer(Protocol):
    """One step of a network."""

    def __call__(self, run: Pass, inputs: Array) -> Array:
        """Return the output."""


class Tapped(Layer, Protocol):
    """A layer with parameters, ``NAME.weight`` and perhaps ``NAME.bias``."""

    @property
    def name(self) -> str:
        """The layer's canonical name."""

    @property
    def kind(self) -> Literal["matrix", "scale"]:
        """What its tap is."""

    @property
    def bias(self) -> bool:
        """Whether it has a bias."""

    def parameters(self) -> Mapping[str, Parameter]:
        """Return its parameters by canonical name."""


@dataclass(frozen=True)
class Dense:
    """``y = W a + b`` with W [outputs, inputs], on the last axis."""

    name: str
    inputs: int
    outputs: int
    bias: bool = True
    kind: Literal["matrix"] = "matrix"

    def parameters(self) -> dict[str, Parameter]:
        """Return weight and bias."""
        return _with_bias(self.name, (self.outputs, self.inputs), self.inputs, bias=self.bias)

    def __call__(self, run: Pass, inputs: Array) -> Array:
        """Return [N, ..., outputs]."""
        return run.tapped(self, lambda: inputs, inputs @ run.weights[f"{self.name}.weight"].T)


@dataclass(frozen=True)
class Conv:
    """A two-dimensional convolution of square kernel with W [outputs, inputs, kernel, kernel], padded with zeros."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: bool = True
    kind: Literal["matrix"] = "matrix"

    def parameters(self) -> dict[str, Parameter]:
        """Return weight and bias."""
        shape = (self.outputs, self.inputs, self.kernel, self.kernel)
        return _with_bias(self.name, shape, self.inputs * self.kernel**2, bias=self.bias)

    def __call__(self, run: Pass, inputs: Array) -> Array:
        """Return [N, H', W', outputs]."""
        output = lax.conv_general_dilated(
            inputs,
            run.weights[f"{self.name}.weight"],
            window_strides=(self.stride, self.stride),
            padding=[(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        return run.tapped(self, lambda: self._patches(inputs, output.shape[1:3]), output)

    def _patches(self, inputs: Array, places: tuple[int, int]) -> Array:
        """Return what each output position sees, [N, H', W', channels x kernel x kernel], flattened as W is."""
        padded = jnp.pad(inputs, ((0, 0), (self.padding, self.padding), (self.padding, self.padding), (0, 0)))
        height, width = (self.stride * (count - 1) + 1 for count in places)
        windows = [
            padded[:, row : row + height : self.stride, column : column + width : self.stride]
            for row in range(self.kernel)
            for column in range(self.kernel)
        ]
        return jnp.stack(windows, axis=-1).reshape(*windows[0].shape[:3], -1)


@dataclass(frozen=True)
class BatchNorm:
    """``y = w * (x - mean) / sqrt(variance + epsilon) + b`` by channel, the last axis, with the batch's own statistics.

    The variance is biased.
    """

    name: str
    channels: int
    epsilon: float = 1e-5
    bias: Literal[True] = True
    kind: Literal["scale"] = "scale"

    def parameters(self) -> dict[str, Parameter]:
        """Return weight and bias, [channels] each."""
        return _with_bias(self.name, (self.channels,), None, bias=True)

    def __call__(self, run: Pass, inputs: Array) -> Array:
        """Return the inputs normalised, scaled and shifted."""
        axes = tuple(range(inputs.ndim - 1))
        mean, variance = inputs.mean(axes), inputs.var(axes)
        if run.constant_statistics:
            mean, variance = lax.stop_gradient((mean, variance))
        normalised = (inputs - mean) * lax.rsqrt(variance + self.epsilon)
        return run.tapped(self, lambda: normalised, normalised * run.weights[f"{self.name}.weight"])


@dataclass(frozen=True)
class Apply:
    """A function of an array without parameters, such as ``jax.nn.relu``."""

    function: Callable[[Array], Array]

    def __call__(self, run: Pass, inputs: Array) -> Array:
        """Return the function's value."""
        return self.function(inputs)


@dataclass(frozen=True)
class MaxPool:
    """The greatest of each square of pixels, side by side; what is left at the far edges is not looked at.

    It is chosen pair by pair, the first of equals, so that a gradient always has one place to go. That of ``max`` looks
    for the places that equal the maximum, and finds none where compiled code has rounded the two differently: NaN.
    """

    size: int

    def __call__(self, run: Pass, inputs: Array) -> Array:
        """Return [N, H // size, W // size, C]."""
        n, height, width, channels = inputs.shape
        rows, columns = height // self.size, width // self.size
        whole = inputs[:, : rows * self.size, : columns * self.size]
        squares = whole.reshape(n, rows, self.size, columns, self.size, channels)
        places = [squares[:, :, row, :, column] for row in range(self.size) for column in range(self.size)]
        return reduce(lambda greatest, other: jnp.where(other > greatest, other, greatest), places)


@dataclass(frozen=True)
class Flatten:
    """Images as rows, in the order channels, height, width."""

    def __call__(self, run: Pass, inputs: Array) -> Array:
        """Return [N, C x H x W]."""
        return jnp.moveaxis(inputs, -1, 1).reshape(inputs.shape[0], -1)


@dataclass(frozen=True)
class Dropout:
    """Zero each element with probability p in training and scale the rest by 1 / (1 - p).

    p is rounded to a multiple of 2^-16, as ``adapters.jax.dropout`` draws.
    """

    p: float

    @property
    def threshold(self) -> int:
        """2^16 p."""
        return round(self.p * 2**16)

    def __call__(self, run: Pass, inputs: Array) -> Array:
        """Return the inputs, dropped out if the pass has masks."""
        if run.mask is None or self.threshold == 0:
            return inputs
        return jnp.where(run.mask(inputs.shape, self.threshold), inputs * (1 / (1 - self.threshold / 2**16)), 0)


def _with_bias(name: str, shape: tuple[int, ...], fan_in: int | None, *, bias: bool) -> dict[str, Parameter]:
    parameters = {f"{name}.weight": Parameter(shape, fan_in)}
    return parameters | ({f"{name}.bias": Parameter(shape[:1], fan_in)} if bias else {})
