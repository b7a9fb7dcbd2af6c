"""Dropout masks from a NumPy stream: the same bits, in the same order, as other backends draw.

Convention: a mask for images is drawn with channels last, [N, H, W, C]; of 16 random bits an element, four elements at
a time, those of at least 2^16 p keep it.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mask", "drawn"]

# A mask's shape, and 2^16 p.
Mask = tuple[tuple[int, ...], int]


def drawn(masks: Iterable[Mask], stream: np.random.Generator) -> tuple[NDArray[np.bool_], ...]:
    """Return masks, True for what is kept."""
    return tuple(_drawn(*mask, stream) for mask in masks)


def _drawn(shape: tuple[int, ...], threshold: int, stream: np.random.Generator) -> NDArray[np.bool_]:
    count = int(np.prod(shape))
    bits = stream.integers(0, 2**64, size=(count + 3) // 4, dtype=np.uint64).view(np.uint16)[:count]
    return (bits >= threshold).reshape(shape)
