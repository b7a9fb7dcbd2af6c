"""The layers that networks are described by: their names and sizes, their parameters, the shapes they make of shapes.

Nothing here computes; each adapter says, for every class of layers, what its framework does.

Convention: a shape is one sample's, [C, H, W] or [d]. A parameter is called ``NAME.weight`` or ``NAME.bias``; a weight
is [outputs, inputs], a convolution's [outputs, inputs, kernel, kernel]. What no gradient moves goes with the parameters
too, as ``NAME.running_mean`` and ``NAME.running_var``.
"""

from dataclasses import dataclass
from math import gcd, prod
from typing import ClassVar, Literal, NamedTuple

from became_core import BecameError

__all__ = [
    "AveragePool",
    "BatchNorm",
    "Convolution",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "Layer",
    "Linear",
    "MaxPool",
    "Parameter",
    "ReLU",
    "Residual",
    "Shape",
    "Step",
    "Tanh",
    "Weighted",
    "is_statistic",
]

Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """A parameter's shape, and how many inputs each output of its layer sees; None for a normalisation layer."""

    shape: Shape
    fan_in: int | None


@dataclass(frozen=True)
class Linear:
    """``y = W a + b``, of flat inputs.

    Attributes:
        name: canonical.
        outputs: how many.
        bias: whether there is b.
    """

    name: str
    outputs: int
    bias: bool = False

    kind: ClassVar[Literal["matrix"]] = "matrix"

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        """Return the parameters by canonical name, for inputs of this shape."""
        return _named(self.name, (self.outputs, shape[0]), shape[0], bias=self.bias)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            BecameError: if the inputs are images.
        """
        if len(shape) != 1:
            raise BecameError(
                f"the layer '{self.name}' is linear, but sees images {list(shape)}; put Flatten before it."
            )
        return (self.outputs,)


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution by a square kernel.

    Attributes:
        name: canonical.
        outputs: how many channels come out.
        kernel: its side.
        stride: how far windows are apart.
        padding: how many zeros are put around an image.
        bias: whether each channel has one.
    """

    name: str
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: bool = False

    kind: ClassVar[Literal["matrix"]] = "matrix"

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        """Return the parameters by canonical name, for inputs of this shape."""
        weight = (self.outputs, shape[0], self.kernel, self.kernel)
        return _named(self.name, weight, prod(weight[1:]), bias=self.bias)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            BecameError: if the inputs are no images, or hold no window.
        """
        return (self.outputs, *_windows(f"'{self.name}'", shape, self.kernel, self.stride, self.padding))


@dataclass(frozen=True)
class BatchNorm:
    """``y = w * (x - mean) / sqrt(variance + epsilon) + b`` by channel, with the batch's own statistics.

    The variance is biased.

    Attributes:
        name: canonical.
        epsilon: what is added to the variance.
        running: whether it has statistics of its own, which are used instead of the batch's in all but training.
    """

    name: str
    epsilon: float = 1e-5
    running: bool = False

    kind: ClassVar[Literal["scale"]] = "scale"
    bias: ClassVar[Literal[True]] = True

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        """Return the parameters by canonical name, for inputs of this shape."""
        statistics = ("running_mean", "running_var") if self.running else ()
        return _named(self.name, shape[:1], None, bias=True) | {
            f"{self.name}.{name}": Parameter(shape[:1], None) for name in statistics
        }

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape


@dataclass(frozen=True)
class GroupNorm:
    """As batch norm, with the statistics of each image by itself, over groups of neighbouring channels (Wu & He 2018).

    Attributes:
        name: canonical.
        most: groups at most; there are as many as divide both this and the channels, their greatest common divisor.
        epsilon: what is added to the variance.
    """

    name: str
    most: int = 32
    epsilon: float = 1e-5

    kind: ClassVar[Literal["scale"]] = "scale"
    bias: ClassVar[Literal[True]] = True

    def groups(self, channels: int) -> int:
        """Return how many groups so many channels make."""
        return gcd(self.most, channels)

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        """Return the parameters by canonical name, for inputs of this shape."""
        return _named(self.name, shape[:1], None, bias=True)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape


@dataclass(frozen=True)
class ReLU:
    """``max(x, 0)``."""

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape


@dataclass(frozen=True)
class Tanh:
    """The hyperbolic tangent."""

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape


@dataclass(frozen=True)
class Dropout:
    """Zero each element with probability p in training and scale the rest by 1 / (1 - p), p in multiples of 2^-16."""

    p: float

    @property
    def threshold(self) -> int:
        """2^16 p, as ``adapters.networks.draws`` has it."""
        return round(self.p * 2**16)

    @property
    def scale(self) -> float:
        """What remains is multiplied by it."""
        return 1 / (1 - self.threshold / 2**16)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape


@dataclass(frozen=True)
class MaxPool:
    """The greatest of each square of pixels, side by side; what is left at the far edges is not looked at."""

    size: int

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            BecameError: if the inputs are no images, or hold no square.
        """
        return (shape[0], *_windows("MaxPool", shape, self.size, self.size, 0))


@dataclass(frozen=True)
class AveragePool:
    """The mean of each square of pixels, side by side; what is left at the far edges is not looked at."""

    size: int

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            BecameError: if the inputs are no images, or hold no square.
        """
        return (shape[0], *_windows("AveragePool", shape, self.size, self.size, 0))


@dataclass(frozen=True)
class Flatten:
    """Images as rows, in the order channels, height, width."""

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return (prod(shape),)


@dataclass(frozen=True)
class Residual:
    """The sum of what two rows of layers make of the same inputs; without a shortcut, the inputs themselves."""

    body: tuple["Layer", ...]
    shortcut: tuple["Layer", ...] = ()


# With parameters.
Weighted = Linear | Convolution | BatchNorm | GroupNorm
# One step of a network.
Step = Weighted | ReLU | Tanh | Dropout | MaxPool | AveragePool | Flatten
Layer = Step | Residual


def is_statistic(name: str) -> bool:
    """Whether a name is that of a statistic, which no gradient moves."""
    return name.endswith((".running_mean", ".running_var"))


def _named(name: str, weight: Shape, fan_in: int | None, *, bias: bool) -> dict[str, Parameter]:
    biases = {f"{name}.bias": Parameter(weight[:1], fan_in)} if bias else {}
    return {f"{name}.weight": Parameter(weight, fan_in), **biases}


def _windows(what: str, shape: Shape, size: int, stride: int, padding: int) -> Shape:
    """Return how many windows of a size there are along height and width."""
    if len(shape) != 3:
        raise BecameError(f"{what} needs images [C, H, W], but sees {list(shape)}; put it before Flatten.")
    counts = tuple((side + 2 * padding - size) // stride + 1 for side in shape[1:])
    if min(counts) < 1:
        raise BecameError(
            f"images are too small: {what} sees {shape[1]}x{shape[2]} pixels, its windows are {size}x{size}."
        )
    return counts
