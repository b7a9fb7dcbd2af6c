"""What dropout keeps: masks from a NumPy stream, the same for every framework, or a key, by which a program draws them.

Convention: a mask is [samples, ...], channels last, True for what is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from adapters.networks import Mask, draw_masks
from became_core.arrays import Array

__all__ = ["Masks", "drawn", "mask_source"]

# A batch's, in the order in which they are needed; or the key of them.
Masks = tuple[Array, ...] | Any


def mask_source(
    masks: Sequence[Mask], stream: np.random.Generator, *, by_framework: bool
) -> Callable[[int, int], Masks]:
    """Return what gives the masks of a batch, by its number and its samples; each is asked for once, in order.

    Args:
        masks: what a network needs of each sample.
        stream: what all is a function of.
        by_framework: whether JAX draws, seeded by the stream: then nothing is drawn here, and a key is given.
    """
    seed = int(stream.integers(2**63))  # drawn in any case: so the stream's masks are those that other adapters draw
    if not by_framework:
        return lambda number, samples: draw_masks(masks, samples, stream)
    key = jax.random.key(seed)
    return lambda number, samples: jax.random.fold_in(key, number)


def drawn(masks: Sequence[Mask], given: Masks, samples: int) -> tuple[Array, ...]:
    """Return a batch's masks where a key of them may be given instead."""
    if isinstance(given, tuple):
        return given
    return tuple(
        jax.random.bits(jax.random.fold_in(given, place), (samples, *shape), "uint16") >= threshold
        for place, (shape, threshold) in enumerate(masks)
    )
