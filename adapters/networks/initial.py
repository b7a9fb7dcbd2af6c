"""Initial weights from seeded NumPy streams: the same for every framework, and for every order of asking.

Convention: PyTorch's defaults. A weight or bias of a linear or convolutional layer is uniform in +-1/sqrt(fan_in), the
fan_in being how many inputs each of the layer's outputs sees; a normalisation layer begins as the identity, its
statistics as mean 0 and variance 1.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adapters.networks.layers import Parameter
from became_core.continual import random_generator

__all__ = ["initial_value", "initial_values"]


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
