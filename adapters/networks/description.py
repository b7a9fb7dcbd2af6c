"""A network as a value: layers in a row, what can be said of them without a framework, and how a framework runs them.

Convention: a shape is one sample's, [C, H, W] or [d], or of text [L] and [L, d]; a residual's body runs before its
shortcut.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from adapters.networks.draws import Mask
from adapters.networks.layers import (
    BatchNorm,
    Branches,
    Dropout,
    Latent,
    Layer,
    Parameter,
    Residual,
    Shape,
    Step,
    Weighted,
)
from became_core import BecameError
from became_core.arrays import Array, Params, namespace

__all__ = ["CANONICAL_AXES", "Architecture", "Backbone", "Pass", "Record", "Tapped", "UserLayer"]

T = TypeVar("T")

# From the layouts of flax and Keras, [in, out] and HWIO, to the canonical ones, by the number of axes.
CANONICAL_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


class Tapped(Protocol):
    """What a tap tells of a layer with parameters, ``NAME.weight`` and perhaps ``NAME.bias``."""

    @property
    def name(self) -> str:
        """The layer's canonical name."""

    @property
    def kind(self) -> Literal["matrix", "scale", "embedding"]:
        """What its tap is."""

    @property
    def bias(self) -> bool:
        """Whether it has a bias."""


@dataclass(frozen=True)
class UserLayer:
    """What a tap tells of a layer of a user's own model, which is no described one; attributes as of ``Tapped``."""

    name: str
    kind: Literal["matrix", "scale", "embedding"]
    bias: bool


# Told of each layer with parameters as it runs: the layer, what gives the inputs that a tap has (patches, for a
# convolution), [N, ..., d_in], and the output, [N, ..., d_out]. What it returns takes the output's place.
Record = Callable[[Tapped, Callable[[], Array], Array], Array]


@dataclass
class Pass:
    """One run of a network. Each adapter has a class of its own, which knows how its framework computes a layer.

    Attributes:
        weights: by canonical name.
        masks: what dropout keeps, True, in the order in which it runs, images with channels last, and what latent
            layers have for noise; None for no dropout and the samples' own noise.
        constant_statistics: whether gradients take batch statistics for constants.
        record: told of each layer with parameters.
        products: the dtype that linear and convolutional layers multiply in, as the framework calls it, for mixed
            precision: what goes in is rounded to it, and what comes out has the dtype of the inputs again.
        moments: if given, takes the batch's own mean and variance of every layer that has running ones, by their names.
    """

    weights: Params
    masks: Sequence[Array] | None = None
    constant_statistics: bool = False
    record: Record = lambda layer, inputs, output: output
    products: Any = None
    moments: Params | None = None

    # By class of layer: (run, layer, inputs) -> output.
    computed: ClassVar[Mapping[type, Callable[[Any, Any, Array], Array]]]

    _taken: int = field(default=0, init=False)
    _ran: set[str] = field(default_factory=set, init=False)

    def __call__(self, layer: Step, inputs: Array) -> Array:
        """Return a layer's output."""
        return self.computed[type(layer)](self, layer, inputs)

    def tapped(self, layer: Tapped, inputs: Callable[[], Array], output: Array) -> Array:
        """Return a layer's output with its bias, after it was recorded.

        Args:
            layer: which runs.
            inputs: gives what its tap has for inputs, [N, ..., d_in].
            output: without bias, [N, ..., d_out].

        Raises:
            BecameError: if the layer runs a second time.
        """
        if layer.name in self._ran:
            raise BecameError(f"the layer '{layer.name}' runs twice in one pass; give each run a layer of its own.")
        self._ran.add(layer.name)
        if layer.bias:
            output = output + self.weights[f"{layer.name}.bias"]
        return self.record(layer, inputs, output)

    def statistics(self, layer: BatchNorm, own: Callable[[], tuple[Array, Array]]) -> tuple[Array, Array]:
        """Return the mean and variance that a layer normalises by: in training, that is with masks, the batch's own.

        Args:
            layer: which runs.
            own: gives the batch's.
        """
        names = f"{layer.name}.running_mean", f"{layer.name}.running_var"
        if layer.running and self.masks is None and self.moments is None:
            mean, variance = (self.weights[name] for name in names)
            return mean, variance
        statistics = own()
        if layer.running and self.moments is not None:
            self.moments.update(zip(names, statistics, strict=True))
        return statistics

    def mask(self, layer: Dropout) -> Array | None:
        """Return what a dropout layer keeps, or None for all."""
        if self.masks is None or layer.threshold == 0:
            return None
        self._taken += 1
        return self.masks[self._taken - 1]

    def latent(self, inputs: Array) -> tuple[Array, Array, Array]:
        """Return means, log variances and noise, [N, d] each; in training, that is with masks, the noise is new."""
        width = inputs.shape[-1] // 3
        mean, log_variance, noise = (inputs[:, place * width : (place + 1) * width] for place in range(3))
        if self.masks is not None:
            self._taken += 1
            noise = namespace(inputs=inputs).asarray(self.masks[self._taken - 1], dtype=inputs.dtype)
        return mean, log_variance, noise


class Backbone(Protocol):
    """Any value that maps images to features by layers, in whatever way it connects them.

    A description is one. A user's own is another: it runs described layers by ``run(layer, inputs)``, and announces
    what else has parameters by ``run.tapped``. JAX needs it hashable.
    """

    @property
    def tapped(self) -> tuple[Tapped, ...]:
        """The layers that have parameters; no two of one name."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters by canonical name."""

    @property
    def masks(self) -> tuple[Mask, ...]:
        """What masks its dropout and latent layers need, in the order in which they run."""

    def __call__(self, run: Any, images: Array) -> Array:
        """Return the features [N, features] of images [N, H, W, C]; each layer that has parameters runs once.

        Args:
            run: a ``Pass`` of the framework's adapter.
            images: normalised.
        """


@dataclass(frozen=True)
class Architecture:
    """A description of a network: layers, one after the other, for images of a certain shape.

    Attributes:
        layers: in the order in which they run.
        image: the shape of a sample.
        beside: how many of the features, the last ones, no head sees: they are outputs as they are, after the head's.
        encoding: the name of the layer without a bias that gives a latent layer its means and log variances; without
            its weight, what the network makes of a sample is a draw from the prior. Empty if there is none.

    Raises:
        BecameError: if two layers have one name, a layer cannot follow the one before it, the images are too small, or
            what comes out is not [N, features].
    """

    layers: tuple[Layer, ...]
    image: Shape
    beside: int = 0
    encoding: str = ""

    def __post_init__(self) -> None:
        """Check that it is a network."""
        names = [layer.name for layer in self.tapped]
        for name in names:
            if names.count(name) > 1:
                raise BecameError(f"two layers are called '{name}'; give each a name of its own.")
        if len(self._walked[1]) not in ((1, 2) if len(self.image) == 1 else (1,)):
            raise BecameError(
                "the backbone must map images [N, C, H, W] to features [N, features], and text to those or to "
                "[N, L, features]."
            )

    @cached_property
    def _walked(self) -> tuple[list[tuple[Step, Shape]], Shape]:
        steps: list[tuple[Step, Shape]] = []
        return steps, _walk(self.layers, self.image, steps)

    @property
    def steps(self) -> Sequence[tuple[Step, Shape]]:
        """Every layer within, in the order in which they run, with the shape of its inputs."""
        return self._walked[0]

    @property
    def width(self) -> int:
        """The number of features."""
        return self._walked[1][-1]

    @cached_property
    def tapped(self) -> tuple[Weighted, ...]:
        """The layers that have parameters."""
        return tuple(layer for layer, _ in self.steps if isinstance(layer, Weighted))

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters by canonical name, in the order in which they are used."""
        weighted = ((layer, shape) for layer, shape in self.steps if isinstance(layer, Weighted))
        return {name: parameter for layer, shape in weighted for name, parameter in layer.parameters(shape).items()}

    @cached_property
    def masks(self) -> tuple[Mask, ...]:
        """What masks its dropout and latent layers need, in the order in which they run."""
        return tuple(
            ((*layer.output_shape(shape)[1:], layer.output_shape(shape)[0]), getattr(layer, "threshold", None))
            for layer, shape in self.steps
            if isinstance(layer, Latent) or (isinstance(layer, Dropout) and layer.threshold)
        )

    def __call__(self, run: Callable[[Step, T], T], images: T) -> T:
        """Return what comes out of the last layer, each layer's output being ``run(layer, inputs)``."""
        features: T = _run(self.layers, images, run)
        return features


def _run(layers: Iterable[Layer], inputs: Any, run: Callable[[Step, Any], Any]) -> Any:
    for layer in layers:
        if isinstance(layer, Residual):
            inputs = _run(layer.body, inputs, run) + _run(layer.shortcut, inputs, run)
        elif isinstance(layer, Branches):
            parts = [_run(part, inputs[:, first:last], run) for first, last, part in layer.parts]
            inputs = namespace(inputs=inputs).concat(parts, axis=1)
        else:
            inputs = run(layer, inputs)
    return inputs


def _walk(layers: Iterable[Layer], shape: Shape, steps: list[tuple[Step, Shape]]) -> Shape:
    """Return the shape that comes out of layers in a row, adding each layer and the shape that goes in to the steps."""
    for layer in layers:
        if isinstance(layer, Residual):
            body, shortcut = (_walk(part, shape, steps) for part in (layer.body, layer.shortcut))
            if body != shortcut:
                first = next(_names(layer.body), "")
                raise BecameError(
                    f"the residual of '{first}' has a body that gives {list(body)} and a shortcut that gives "
                    f"{list(shortcut)}; only equal shapes can be added."
                )
            shape = body
        elif isinstance(layer, Branches):
            shape = (sum(_branch(part, shape, steps) for part in layer.parts),)
        else:
            steps.append((layer, shape))
            shape = layer.output_shape(shape)
    return shape


def _branch(part: tuple[int, int, tuple[Layer, ...]], shape: Shape, steps: list[tuple[Step, Shape]]) -> int:
    """Return how many features come out of one of several branches."""
    first, last, layers = part
    if len(shape) != 1 or not 0 <= first < last <= shape[0]:
        raise BecameError(f"a branch has the features {first} to {last} of {list(shape)}; give a part of a row [d].")
    made = _walk(layers, (last - first,), steps)
    if len(made) != 1:
        raise BecameError(f"the branch of the features {first} to {last} makes {list(made)} of them, and no row [d].")
    return made[0]


def _names(layers: Iterable[Layer]) -> Iterator[str]:
    return (layer.name for layer in layers if isinstance(layer, Weighted))
