"""Backbones, images to features: layers in a row, as a value.

Convention: images enter as [N, H, W, C]; a backbone returns [N, features]. Names, sizes and initial weights are
canonical, so that the weights of one backend load into another.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import jax

from adapters.jax.layers import (
    Apply,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Flatten,
    Layer,
    MaxPool,
    Pass,
    Tapped,
)
from became_core import BecameError
from became_core.arrays import Array

__all__ = ["BACKBONES", "Backbone", "Sequential", "alexnet", "build_backbone", "mlp"]


class Backbone(Hashable, Protocol):
    """Any value that maps images to features by layers, in whatever way it connects them."""

    @property
    def tapped(self) -> tuple[Tapped, ...]:
        """The layers that have parameters; no two of one name."""

    def __call__(self, run: Pass, images: Array) -> Array:
        """Return the features [N, features] of images [N, H, W, C]; each layer that has parameters is called once."""


@dataclass(frozen=True)
class Sequential:
    """Layers one after the other.

    Raises:
        BecameError: if two layers have one name.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        """Check the names."""
        names = [layer.name for layer in self.tapped]
        for name in names:
            if names.count(name) > 1:
                raise BecameError(f"two layers are called '{name}'; give each a name of its own.")

    @property
    def tapped(self) -> tuple[Tapped, ...]:
        """The layers that have parameters."""
        return tuple(layer for layer in self.layers if isinstance(layer, Dense | Conv | BatchNorm))

    def __call__(self, run: Pass, images: Array) -> Array:
        """Return the last layer's output."""
        for layer in self.layers:
            images = layer(run, images)
        return images


def mlp(channels: int, height: int, width: int) -> Sequential:
    """Return the fully connected network of the MNIST benchmarks: two hidden layers of 100 units, no biases."""
    relu = Apply(jax.nn.relu)
    first = Dense("fc1", channels * height * width, 100, bias=False)
    return Sequential((Flatten(), first, relu, Dense("fc2", 100, 100, bias=False), relu))


def alexnet(channels: int, height: int, width: int) -> Sequential:
    """Return the AlexNet-like network of the CIFAR-100 benchmarks (Serra 2018, as used by Saha 2021), no biases.

    Three convolutions (64 at 4x4, 128 at 3x3, 256 at 2x2) and two fully connected layers of 2048 units, each followed
    by batch norm with batch statistics, ReLU and dropout (.2, .2, .5, .5, .5); the convolutions by 2x2 max-pooling too.
    """
    flat = 256 * _after_convolutions(height) * _after_convolutions(width)
    blocks = (
        _convolution(1, channels, 64, kernel=4, dropout=0.2),
        _convolution(2, 64, 128, kernel=3, dropout=0.2),
        _convolution(3, 128, 256, kernel=2, dropout=0.5),
        (Flatten(),),
        _fully_connected(1, flat, 2048, dropout=0.5),
        _fully_connected(2, 2048, 2048, dropout=0.5),
    )
    return Sequential(tuple(chain.from_iterable(blocks)))


def _after_convolutions(size: int) -> int:
    """Return an image side's length after the three convolutions, each with its pooling."""
    for kernel in (4, 3, 2):
        size = (size - kernel + 1) // 2
    return size


def _convolution(number: int, channels: int, filters: int, kernel: int, dropout: float) -> tuple[Layer, ...]:
    convolution = Conv(f"conv{number}", channels, filters, kernel, bias=False)
    return (convolution, BatchNorm(f"bn{number}", filters), Apply(jax.nn.relu), Dropout(dropout), MaxPool(2))


def _fully_connected(number: int, inputs: int, outputs: int, dropout: float) -> tuple[Layer, ...]:
    position = number + 3  # after three convolutions
    linear = Dense(f"fc{number}", inputs, outputs, bias=False)
    return (linear, BatchNorm(f"bn{position}", outputs), Apply(jax.nn.relu), Dropout(dropout))


# Each takes an image's channels, height and width.
BACKBONES: dict[str, Callable[[int, int, int], Sequential]] = {"alexnet": alexnet, "mlp": mlp}


def build_backbone(name: str, shape: tuple[int, int, int]) -> Sequential:
    """Return the backbone of that name for images of this shape [C, H, W].

    Raises:
        BecameError: if there is none, or the images are too small for it.
    """
    if name not in BACKBONES:
        raise BecameError(f"there is no network '{name}'; choose from {', '.join(sorted(BACKBONES))}.")
    if name == "alexnet" and min(shape[1:]) < 22:
        raise BecameError(f"the alexnet network needs images of at least 22x22 pixels, not {shape[1]}x{shape[2]}.")
    return BACKBONES[name](*shape)
