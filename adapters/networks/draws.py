"""What is drawn at random for networks, by NumPy: initial weights and dropout masks, the same for every framework.

Convention of weights: PyTorch's defaults. A weight or bias of a linear or convolutional layer is uniform in
+-1/sqrt(fan_in), the fan_in being how many inputs each of the layer's outputs sees; a normalisation layer begins as the
identity, its statistics as mean 0 and variance 1. Each parameter has a generator of its own, so the order does not
matter.

Convention of masks: a mask for images is drawn with channels last, [N, H, W, C]; of 16 random bits an element those of
at least 2^16 p keep it. A framework's own generator may fill a mask one element at a time, as PyTorch's does on the
CPU, which costs a fifth of a training step of a small convolutional network; 16 random bits an element, drawn 64 at a
time, cost next to nothing. A framework may be asked to draw them itself: on an accelerator that saves the host the
draw, and the way from there. The noise of a latent layer is drawn as a mask is, and is standard normal.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from adapters.networks.layers import Parameter
from became_core import BecameError
from became_core.continual import random_generator

__all__ = [
    "DropoutMasks",
    "Mask",
    "checked_masks",
    "draw_mask",
    "draw_masks",
    "initial_value",
    "initial_values",
]

# What draws dropout's masks: the generators that the core gives, alike for every framework, or the framework itself.
DropoutMasks = Literal["numpy", "framework"]

# The shape of one sample's mask, and 2^16 p; None for standard normal noise.
Mask = tuple[tuple[int, ...], int | None]


def initial_values(seed: int, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[np.float64]]:
    """Return the first value of each parameter by its canonical name; the seed names the draws."""
    return {name: initial_value(seed, name, *parameter) for name, parameter in parameters.items()}


def initial_value(seed: int, name: str, shape: tuple[int, ...], fan_in: int | None) -> NDArray[np.float64]:
    """Return the first value of a parameter.

    Args:
        seed: with the name, it names the draw.
        name: canonical, e.g. "conv1.weight".
        shape: of the parameter.
        fan_in: of its layer; None for a normalisation layer, whose weight and variance are ones, all else being zeros.
    """
    if fan_in is None:
        return np.ones(shape) if name.endswith(("weight", "running_var")) else np.zeros(shape)
    bound = 1 / math.sqrt(fan_in)
    return random_generator(seed, f"initial {name}").uniform(-bound, bound, shape)


def checked_masks(name: str) -> str:
    """Return what is to draw dropout's masks.

    Raises:
        BecameError: if there is no such thing.
    """
    if name not in get_args(DropoutMasks):
        raise BecameError(f"dropout's masks are drawn by 'numpy' or by the 'framework', not by '{name}'.")
    return name


def draw_mask(shape: tuple[int, ...], threshold: int | None, rng: np.random.Generator) -> NDArray[Any]:
    """Return a mask of this shape, True for what is kept; standard normal noise if there is no threshold."""
    if threshold is None:
        return rng.standard_normal(shape)
    count = int(np.prod(shape))
    bits = rng.integers(0, 2**64, size=(count + 3) // 4, dtype=np.uint64).view(np.uint16)[:count]
    return (bits >= threshold).reshape(shape)


def draw_masks(masks: Iterable[Mask], samples: int, rng: np.random.Generator) -> tuple[NDArray[Any], ...]:
    """Return the masks of a batch, in order, each [samples, ...]."""
    return tuple(draw_mask((samples, *shape), threshold, rng) for shape, threshold in masks)
