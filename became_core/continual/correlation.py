"""Pearson's correlation of predictions with targets, from sums over samples.

Sums of batches, and those of processes, add up to those of all samples, so that no process has all outputs at a time.

Convention: sums are float64 arrays [6, outputs], in the order of ``correlation_sums``. Of several outputs the
correlation is the mean of each output's own. It does not depend on the unit of either side.
"""

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Array, on_host

__all__ = ["correlation", "correlation_sums"]

Sums = NDArray[np.float64]


def correlation_sums(predictions: Array, targets: Array) -> Sums:
    """Return the sums over samples of 1, x, y, x^2, y^2 and x y for each output, x being predictions and y targets.

    Args:
        predictions: [..., outputs].
        targets: of the same shape.
    """
    x, y = (np.asarray(on_host(side), np.float64).reshape(-1, side.shape[-1]) for side in (predictions, targets))
    return np.stack([part.sum(axis=0) for part in (np.ones_like(x), x, y, x * x, y * y, x * y)])


def correlation(sums: Sums) -> float:
    """Return the correlation, from -1 to 1, given the sums over all samples.

    It is 0 where predictions are constant, because they then say nothing about the targets. It is not defined, and NaN,
    where the targets of an output are constant, because then nothing can say anything about them.

    Examples:
        >>> predictions, targets = np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [3.0], [2.0]])
        >>> round(correlation(correlation_sums(predictions, targets)), 3)
        0.5
        >>> correlation(correlation_sums(predictions * 0, targets))
        0.0
    """
    count, x, y, xx, yy, xy = sums
    # n^2 times the variances. What rounding alone makes of a constant is no more than n eps of the first term.
    spread_x, spread_y = count * xx - x * x, count * yy - y * y
    eps = np.finfo(np.float64).eps
    flat_x, flat_y = spread_x <= count * eps * (count * xx), spread_y <= count * eps * (count * yy)
    root = np.sqrt(np.where(flat_x, 1, spread_x)) * np.sqrt(np.where(flat_y, 1, spread_y))
    of_each = np.where(flat_x, 0, np.clip((count * xy - x * y) / root, -1, 1))
    return float(np.mean(np.where(flat_y, np.nan, of_each)))
