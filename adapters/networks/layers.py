"""The layers that networks are described by: their names and sizes, their parameters, the shapes they make of shapes.

Nothing here computes; each adapter says, for every class of layers, what its framework does.

Convention: a shape is one sample's, [C, H, W] or [d]; of text [L] bytes, and then [L, d]. A parameter is called
``NAME.weight`` or ``NAME.bias``; a weight is [outputs, inputs], a convolution's [outputs, inputs, kernel, kernel]. What
no gradient moves goes with the parameters too, as ``NAME.running_mean`` and ``NAME.running_var``.
"""

from dataclasses import dataclass
from math import gcd, prod
from typing import ClassVar, Literal, NamedTuple

from became_core import BecameError

__all__ = [
    "GELU",
    "AveragePool",
    "BatchNorm",
    "Branches",
    "CausalAttention",
    "Convolution",
    "Dropout",
    "Embedding",
    "Flatten",
    "GroupNorm",
    "LastPosition",
    "Latent",
    "Layer",
    "LayerNorm",
    "Linear",
    "MaxPool",
    "Parameter",
    "Positions",
    "ReLU",
    "Residual",
    "Shape",
    "Step",
    "Tanh",
    "Weighted",
]

Shape = tuple[int, ...]


class _KeepsShape:
    """A layer whose output has the shape of its inputs."""

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        return shape


class Parameter(NamedTuple):
    """A parameter's shape, and how many inputs each output of its layer sees; None for a normalisation layer."""

    shape: Shape
    fan_in: int | None


@dataclass(frozen=True)
class Linear:
    """``y = W a + b``, of flat inputs, or at each position of a text.

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
        return _named(self.name, (self.outputs, shape[-1]), shape[-1], bias=self.bias)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            BecameError: if the inputs are images.
        """
        if len(shape) > 2:
            raise BecameError(
                f"the layer '{self.name}' is linear, but sees images {list(shape)}; put Flatten before it."
            )
        return (*shape[:-1], self.outputs)


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
class BatchNorm(_KeepsShape):
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


@dataclass(frozen=True)
class GroupNorm(_KeepsShape):
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


@dataclass(frozen=True)
class Embedding:
    """A row of W for each byte or other token of a text, [L] -> [L, width].

    Attributes:
        name: canonical.
        size: how many tokens there are.
        width: of a row.
    """

    name: str
    size: int
    width: int

    kind: ClassVar[Literal["embedding"]] = "embedding"
    bias: ClassVar[Literal[False]] = False

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        """Return the parameters by canonical name, for inputs of this shape."""
        return _named(self.name, (self.size, self.width), self.width, bias=False)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            BecameError: if the inputs are no text.
        """
        if len(shape) != 1:
            raise BecameError(f"the layer '{self.name}' embeds tokens [L], but sees {list(shape)}.")
        return (*shape, self.width)


@dataclass(frozen=True)
class Positions(_KeepsShape):
    """``y_l = x_l + w_l``: a row for each position of a text, [L, d] -> [L, d].

    Attributes:
        name: canonical.
        size: how many positions there are, at most.
    """

    name: str
    size: int

    kind: ClassVar[Literal["embedding"]] = "embedding"
    bias: ClassVar[Literal[False]] = False

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        """Return the parameters by canonical name, for inputs of this shape."""
        return _named(self.name, (self.size, shape[-1]), shape[-1], bias=False)


@dataclass(frozen=True)
class LayerNorm(_KeepsShape):
    """``y = w * (x - mean) / sqrt(variance + epsilon) + b``, with the statistics of each position (Ba 2016).

    Attributes:
        name: canonical.
        epsilon: what is added to the variance.
    """

    name: str
    epsilon: float = 1e-5

    kind: ClassVar[Literal["scale"]] = "scale"
    bias: ClassVar[Literal[True]] = True

    def parameters(self, shape: Shape) -> dict[str, Parameter]:
        """Return the parameters by canonical name, for inputs of this shape."""
        return _named(self.name, shape[-1:], None, bias=True)


@dataclass(frozen=True)
class CausalAttention:
    """Each position's mean of the values before it, its own among them, weighed by softmax(q . k / sqrt(d_head)).

    Inputs are queries, keys and values in a row, [L, 3 d]; the output is [L, d] (Vaswani 2017).

    Attributes:
        heads: how many; they divide d.
    """

    heads: int

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            BecameError: if the heads do not divide the inputs.
        """
        if len(shape) != 2 or shape[1] % (3 * self.heads):
            raise BecameError(f"attention by {self.heads} heads needs inputs [L, 3 d], but sees {list(shape)}.")
        return (shape[0], shape[1] // 3)


@dataclass(frozen=True)
class GELU(_KeepsShape):
    """``x Phi(x)``, Phi being the normal distribution function (Hendrycks & Gimpel 2016)."""


@dataclass(frozen=True)
class ReLU(_KeepsShape):
    """``max(x, 0)``."""


@dataclass(frozen=True)
class Tanh(_KeepsShape):
    """The hyperbolic tangent."""


@dataclass(frozen=True)
class Dropout(_KeepsShape):
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
class LastPosition:
    """What a sequence has at its last position, which causal attention lets see all of it: [L, d] to [d]."""

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            BecameError: if the inputs are no sequence.
        """
        if len(shape) != 2:
            raise BecameError(f"LastPosition needs a sequence [L, d], but sees {list(shape)}.")
        return shape[1:]


@dataclass(frozen=True)
class Latent:
    """A draw from the normal distribution that a sample was encoded as, ``mean + exp(log variance / 2) noise``.

    By Kingma & Welling (2014). Inputs are the means, the log variances and the sample's noise in a row, [3 d]; the
    output is [d]. In training new noise is drawn, as a dropout mask is; otherwise it is the sample's own, so that all
    that is measured is a function of the weights.
    """

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the output.

        Raises:
            BecameError: if the inputs are no such row.
        """
        if len(shape) != 1 or shape[0] % 3:
            raise BecameError(f"Latent needs means, log variances and noise in a row, [3 d], but sees {list(shape)}.")
        return (shape[0] // 3,)


@dataclass(frozen=True)
class Branches:
    """Rows of layers, each on a part of the same features; what comes out of them lies in a row.

    Attributes:
        parts: for each, at which feature it begins, before which it ends, and its layers; none for the features
            themselves.
    """

    parts: tuple[tuple[int, int, tuple["Layer", ...]], ...]


@dataclass(frozen=True)
class Residual:
    """The sum of what two rows of layers make of the same inputs; without a shortcut, the inputs themselves."""

    body: tuple["Layer", ...]
    shortcut: tuple["Layer", ...] = ()


# With parameters.
Weighted = Linear | Convolution | BatchNorm | GroupNorm | LayerNorm | Embedding | Positions
# One step of a network.
Step = (
    Weighted | ReLU | Tanh | GELU | CausalAttention | Dropout | MaxPool | AveragePool | Flatten | LastPosition | Latent
)
Layer = Step | Residual | Branches


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
