"""Networks: images to features by a sequence of layers, of which none holds a parameter; the benchmarks' two backbones.

Convention: images are [N, H, W, C]; parameters are named arrays in canonical layouts, apart from the network; a head
for each task, without bias, is the learner's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from adapters.initial import initial_value
from adapters.tensorflow.layers import (
    BatchNorm,
    Convolution,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool,
    Pointwise,
    Shape,
    Weighted,
)
from became_core import BecameError
from became_core.arrays import Array, Params

__all__ = ["BACKBONES", "Network", "Record", "alexnet", "build_network", "initial_values", "mlp"]

# Told of each layer with parameters as it runs: the layer, what its weight acts on, its output.
Record = Callable[[Weighted, Array, Array], None]


@dataclass(frozen=True)
class Network:
    """A sequence of layers.

    Attributes:
        layers: in the order in which they run.
        image: the shape of an image, [H, W, C].

    Raises:
        BecameError: if what comes out of the last layer is not [N, features].
    """

    layers: tuple[Layer, ...]
    image: Shape

    def __post_init__(self) -> None:
        """Check what comes out."""
        if len(self._shapes[-1]) != 1:
            raise BecameError("the backbone must map images [N, C, H, W] to features [N, features].")

    @cached_property
    def _shapes(self) -> list[Shape]:
        """What each layer sees of a sample, and what comes out of the last."""
        shapes = [self.image]
        for layer in self.layers:
            shapes.append(layer.output_shape(shapes[-1]))
        return shapes

    @property
    def width(self) -> int:
        """The number of features."""
        return self._shapes[-1][0]

    @property
    def parameters(self) -> dict[str, Shape]:
        """The shape of each parameter by canonical name, in the order of the layers."""
        seen = zip(self.layers, self._shapes, strict=False)  # the last shape is no layer's input
        return {
            k: v for layer, shape in seen if isinstance(layer, Weighted) for k, v in layer.parameters(shape).items()
        }

    def initial(self, seed: int) -> dict[str, NDArray[np.float64]]:
        """Return the initial weights by canonical name, the same for every framework.

        Args:
            seed: names the draws.
        """
        values: dict[str, NDArray[np.float64]] = {}
        for layer, shape in zip(self.layers, self._shapes, strict=False):
            if isinstance(layer, Weighted):
                values |= initial_values(layer, shape, seed)
        return values

    def masks(self, samples: int, stream: np.random.Generator) -> list[NDArray[np.bool_]]:
        """Draw what each dropout layer keeps of a batch, booleans [N, ...], 16 random bits an element.

        All backends draw so, images with channels last, and have the same masks.
        """
        drawn = []
        for layer, shape in zip(self.layers, self._shapes, strict=False):
            if isinstance(layer, Dropout) and layer.threshold:
                count = samples * prod(shape)
                bits = stream.integers(0, 2**64, size=(count + 3) // 4, dtype=np.uint64).view(np.uint16)[:count]
                drawn.append((bits >= layer.threshold).reshape(samples, *shape))
        return drawn

    def features(
        self,
        theta: Params,
        images: Array,
        masks: Sequence[Array] = (),
        *,
        constant_statistics: bool = False,
        record: Record = lambda layer, a, outputs: None,
    ) -> Array:
        """Return the features, [N, width].

        Args:
            theta: the parameters by canonical name.
            images: normalised, [N, H, W, C].
            masks: of all dropout layers, as drawn by ``masks``; without any there is no dropout.
            constant_statistics: whether batch statistics are constants for gradients.
            record: told of each layer with parameters.
        """
        remaining = iter(masks)
        x = images
        for layer in self.layers:
            if isinstance(layer, Weighted):
                a = layer.prepared(x, constant_statistics)
                x = layer.applied(theta, a)
                record(layer, a, x)
            elif isinstance(layer, Dropout):
                x = layer.applied(x, next(remaining)) if masks and layer.threshold else x
            else:
                x = layer.applied(x)
        return x


def initial_values(layer: Weighted, shape: Shape, seed: int) -> dict[str, NDArray[np.float64]]:
    """Return a layer's initial weights by canonical name.

    Args:
        layer: any with parameters.
        shape: of its inputs.
        seed: names the draws.
    """
    shapes = layer.parameters(shape)
    fan_in = prod(shapes[f"{layer.name}.weight"][1:]) if layer.kind == "matrix" else None
    return {name: initial_value(seed, name, each, fan_in) for name, each in shapes.items()}


def mlp(channels: int, height: int, width: int) -> Network:
    """Return the fully connected network of the MNIST benchmarks: two hidden layers of 100 units, no biases."""
    relu = Pointwise(tf.nn.relu)
    return Network((Flatten(), Linear("fc1", 100), relu, Linear("fc2", 100), relu), (height, width, channels))


def alexnet(channels: int, height: int, width: int) -> Network:
    """Return the AlexNet-like network of the CIFAR-100 benchmarks (Serra 2018, as used by Saha 2021), no biases.

    Three convolutions (64 at 4x4, 128 at 3x3, 256 at 2x2) and two fully connected layers of 2048 units, each followed
    by batch norm with batch statistics, ReLU and dropout (.2, .2, .5, .5, .5); the convolutions by 2x2 max-pooling too.

    Raises:
        BecameError: if the images are too small for it.
    """
    if min(height, width) < 22:
        raise BecameError(f"the alexnet network needs images of at least 22x22 pixels, not {height}x{width}.")
    pool = MaxPool((2, 2), (2, 2))
    layers: list[Layer] = []
    for number, (filters, kernel, p) in enumerate(((64, 4, 0.2), (128, 3, 0.2), (256, 2, 0.5)), start=1):
        layers += [Convolution(f"conv{number}", filters, (kernel, kernel)), *_normalised(number, p), pool]
    layers.append(Flatten())
    for number in (1, 2):
        layers += [Linear(f"fc{number}", 2048), *_normalised(number + 3, 0.5)]
    return Network(tuple(layers), (height, width, channels))


def _normalised(number: int, p: float) -> list[Layer]:
    return [BatchNorm(f"bn{number}"), Pointwise(tf.nn.relu), Dropout(round(p * 2**16))]


# Each takes an image's channels, height and width.
BACKBONES: dict[str, Callable[[int, int, int], Network]] = {"alexnet": alexnet, "mlp": mlp}


def build_network(name: str, shape: tuple[int, int, int]) -> Network:
    """Return the backbone of that name for images of this shape [C, H, W].

    Raises:
        BecameError: if there is none, or the images are too small for it.
    """
    if name not in BACKBONES:
        raise BecameError(f"there is no network '{name}'; choose from {', '.join(sorted(BACKBONES))}.")
    return BACKBONES[name](*shape)
