"""Initial weights, the same for every framework: drawn by NumPy, by canonical name and shape.

Convention: a weight [d_out, ...] has the fan-in d_in of its flattened trailing axes and is uniform in
±1/sqrt(d_in), which is what PyTorch gives linear layers and convolutions; a normalisation layer, whose weight has one
axis, begins as the identity. One stream is drawn from in the order of the names.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from became_core.continual import random_stream

__all__ = ["initial_weights"]


def initial_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, NDArray[np.float64]]:
    """Return a network's initial weights.

    Args:
        shapes: each parameter's shape by its canonical name, ``conv1.weight`` [O, I, H, W], in the network's order.
        seed: names the draw.
    """
    stream = random_stream(seed, "weights")
    return {name: _initial(name, shape, stream) for name, shape in shapes.items()}


def _initial(name: str, shape: tuple[int, ...], stream: np.random.Generator) -> NDArray[np.float64]:
    if len(shape) == 1:
        return np.ones(shape) if name.endswith("weight") else np.zeros(shape)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return stream.uniform(-bound, bound, size=shape)
