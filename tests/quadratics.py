"""Quadratics along many directions, some of whose coefficients end at a bound and some of whose do not."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["crossed"]

Array = NDArray[np.float64]


def crossed(size: int, reach: float, draw: np.random.Generator, apart: float = 1.0) -> tuple[Array, Array]:
    """Slope and curvature of directions that have something in common; the minimum without bounds is far out.

    Args:
        size: how many directions.
        reach: how far out: coefficients there are between -reach and 3 reach.
        draw: what draws them.
        apart: how much of its own each direction has beside what all share.
    """
    root = apart * draw.normal(size=(size, size)) + draw.normal(size=(1, size))
    curvature = root @ root.T
    return -curvature @ draw.uniform(-reach, 3 * reach, size=size), curvature
