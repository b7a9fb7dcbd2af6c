"""Dropout masks from a NumPy stream: the same bits, in the same order, for every framework.

A framework's own generator may fill a mask one element at a time, PyTorch's on the CPU for one, which costs a fifth of
a training step of a small convolutional network; 16 random bits an element, drawn 64 at a time, cost next to nothing.

Convention: a mask for images is drawn with channels last, [N, H, W, C]; of 16 random bits an element those of at least
2^16 p keep it.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mask", "draw_mask", "draw_masks"]

# The shape of one sample's mask, and 2^16 p.
Mask = tuple[tuple[int, ...], int]


def draw_mask(shape: tuple[int, ...], threshold: int, stream: np.random.Generator) -> NDArray[np.bool_]:
    """Return a mask of this shape, True for what is kept."""
    count = int(np.prod(shape))
    bits = stream.integers(0, 2**64, size=(count + 3) // 4, dtype=np.uint64).view(np.uint16)[:count]
    return (bits >= threshold).reshape(shape)


def draw_masks(masks: Iterable[Mask], samples: int, stream: np.random.Generator) -> tuple[NDArray[np.bool_], ...]:
    """Return the masks of a batch, in order, each [samples, ...]."""
    return tuple(draw_mask((samples, *shape), threshold, stream) for shape, threshold in masks)
