"""The curved path by brute force: the points of the curve, the least loss along it, and the two posteriors' mode.

Convention: float64; weights are vectors [d], curvatures dense matrices [d, d]; t in [0, 1].
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["curve_point", "least_along_curve", "posterior_mode"]

Array = NDArray[np.float64]


def curve_point(theta_gp: Array, control: Array, theta_hat: Array, t: float) -> Array:
    """Return (1 - t)^2 theta_gp + 2 t (1 - t) control + t^2 theta_hat."""
    return (1 - t) ** 2 * theta_gp + 2 * t * (1 - t) * control + t**2 * theta_hat


def least_along_curve(slope: Array, curvature: Array, points: int = 20001) -> float:
    """Return the least value of a quadratic of two directions at the coefficients t and 2 t (1 - t), over a grid of t.

    Args:
        slope: b [2].
        curvature: C [2, 2].
        points: how many there are, with both ends.
    """
    t = np.linspace(0.0, 1.0, points)
    a = np.stack([t, 2 * t * (1 - t)], axis=1)
    return float(np.min(a @ slope + 0.5 * np.sum((a @ curvature) * a, axis=1)))


def posterior_mode(theta_gp: Array, theta_hat: Array, old: Array, new: Array) -> Array:
    """Return the solution of (P_old + P_new) theta = P_old theta_gp + P_new theta_hat."""
    return np.asarray(np.linalg.solve(old + new, old @ theta_gp + new @ theta_hat), dtype=np.float64)
