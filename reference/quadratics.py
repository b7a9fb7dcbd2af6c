"""The least value of a quadratic b.a + 1/2 a.C.a in the box and on the simplex, by a search over all faces.

On a face, some coefficients are at a bound and the others are free. At a minimum, the derivative along the minimum's
face is zero. So the minimum is the lowest among the feasible stationary points of all faces, whether C is definite or
not. If a face has many stationary points, one of its own faces has a point that is as low.

Convention: float64; slope b [K], curvature C [K, K], symmetric.
"""

from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

__all__ = ["height", "minimum_in_box", "minimum_on_simplex"]

Array = NDArray[np.float64]


def height(slope: Array, curvature: Array, a: Array) -> float:
    """Return b.a + 1/2 a.C.a."""
    return float(slope @ a + 0.5 * a @ curvature @ a)


def minimum_in_box(slope: Array, curvature: Array) -> float:
    """Return the least value over 0 <= a_k <= 1."""
    lowest = np.inf
    for face in product((0.0, 1.0, None), repeat=len(slope)):
        a = np.array([0.0 if bound is None else bound for bound in face])
        free = [k for k, bound in enumerate(face) if bound is None]
        for solution in _stationary(curvature[np.ix_(free, free)], slope[free] + curvature[free] @ a):
            a[free] = solution
            if np.all(a >= 0) and np.all(a <= 1):
                lowest = min(lowest, height(slope, curvature, a))
    return lowest


def minimum_on_simplex(slope: Array, curvature: Array) -> float:
    """Return the least value over a_k >= 0 with sum 1."""
    lowest = np.inf
    for face in product((False, True), repeat=len(slope)):
        if not any(face):
            continue
        first, *others = np.flatnonzero(face).tolist()
        # With a = e_first + sum_k t_k (e_k - e_first) the sum is always 1; only the signs remain to be checked.
        origin = np.eye(len(slope))[first]
        directions = np.eye(len(slope))[others] - origin
        for t in _stationary(directions @ curvature @ directions.T, directions @ (slope + curvature @ origin)):
            a = origin + t @ directions
            if np.all(a >= 0):
                lowest = min(lowest, height(slope, curvature, a))
    return lowest


def _stationary(curvature: Array, slope: Array) -> Iterator[Array]:
    """Yield a point at which the derivative is zero, if there is one."""
    solution = np.zeros(0)
    if len(slope):
        solution = np.asarray(np.linalg.lstsq(curvature, -slope, rcond=None)[0], dtype=np.float64)
    if np.allclose(curvature @ solution, -slope, atol=1e-9):
        yield solution
