"""Dropout masks from a NumPy stream: the same bits, in the same order, for every framework.

A framework's own generator may fill a mask one element at a time, PyTorch's on the CPU for one, which costs a fifth of
a training step of a small convolutional network; 16 random bits an element, drawn 64 at a time, cost next to nothing.
A framework may be asked to draw them itself: on an accelerator that saves the host the draw, and the way from there.

Convention: a mask for images is drawn with channels last, [N, H, W, C]; of 16 random bits an element those of at least
2^16 p keep it.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from became_core import BecameError

__all__ = ["DropoutMasks", "Mask", "checked_masks", "draw_mask", "draw_masks"]

# What draws dropout's masks: the streams that the core gives, alike for every framework, or the framework.
DropoutMasks = Literal["numpy", "framework"]

# The shape of one sample's mask, and 2^16 p.
Mask = tuple[tuple[int, ...], int]


def checked_masks(name: str) -> str:
    """Return what is to draw dropout's masks.

    Raises:
        BecameError: if there is no such thing.
    """
    if name not in get_args(DropoutMasks):
        raise BecameError(f"dropout's masks are drawn by 'numpy' or by the 'framework', not by '{name}'.")
    return name


def draw_mask(shape: tuple[int, ...], threshold: int, stream: np.random.Generator) -> NDArray[np.bool_]:
    """Return a mask of this shape, True for what is kept."""
    count = int(np.prod(shape))
    bits = stream.integers(0, 2**64, size=(count + 3) // 4, dtype=np.uint64).view(np.uint16)[:count]
    return (bits >= threshold).reshape(shape)


def draw_masks(masks: Iterable[Mask], samples: int, stream: np.random.Generator) -> tuple[NDArray[np.bool_], ...]:
    """Return the masks of a batch, in order, each [samples, ...]."""
    return tuple(draw_mask((samples, *shape), threshold, stream) for shape, threshold in masks)
