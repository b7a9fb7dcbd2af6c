"""What dropout keeps: masks from a NumPy stream, the same for every framework, or drawn by TensorFlow.

Convention: a mask is [samples, ...], channels last, True for what is kept.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from adapters.networks import Mask, draw_masks
from became_core.arrays import Array

__all__ = ["mask_source"]


def mask_source(
    masks: Sequence[Mask], stream: np.random.Generator, *, by_framework: bool
) -> Callable[[int], Sequence[Array]]:
    """Return what draws the masks of so many samples, one batch after the other.

    Args:
        masks: what a network needs of each sample.
        stream: what all is a function of.
        by_framework: whether TensorFlow draws, seeded by the stream.
    """
    seed = int(stream.integers(2**63))  # drawn in any case: so the stream's masks are those that other adapters draw
    if not by_framework:
        return lambda samples: draw_masks(masks, samples, stream)
    generator = tf.random.Generator.from_seed(seed)
    return lambda samples: tuple(
        generator.uniform((samples, *shape)) >= threshold / 2**16 for shape, threshold in masks
    )
