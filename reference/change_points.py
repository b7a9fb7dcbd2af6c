"""Change points by enumeration: every way to cut a series into runs, each with its own mean and variance.

Convention: a run's length counts the values up to the last one. A normal-gamma prior: the precision of a run has a
gamma distribution of shape ``freedom / 2`` and rate ``squares / 2``, and its mean, given the precision, is normal
around 0 with the precision times ``count``.
"""

from itertools import combinations, pairwise
from math import lgamma, log, pi

import numpy as np
from numpy.typing import NDArray

__all__ = ["log_evidence_of_run", "run_length_posterior"]


def log_evidence_of_run(values: NDArray[np.float64], count: float, freedom: float, squares: float) -> float:
    """Return the logarithm of the marginal likelihood of one run (Murphy 2007, equation 95)."""
    n, mean = len(values), float(np.mean(values))
    after_count, after_freedom = count + n, freedom + n
    scatter = float(np.sum((values - mean) ** 2))
    after_squares = squares + scatter + count * n * mean**2 / after_count
    return (
        lgamma(after_freedom / 2)
        - lgamma(freedom / 2)
        + freedom / 2 * log(squares / 2)
        - after_freedom / 2 * log(after_squares / 2)
        + 0.5 * (log(count) - log(after_count))
        - n / 2 * log(2 * pi)
    )


def run_length_posterior(
    values: NDArray[np.float64], hazard: float, count: float, freedom: float, squares: float
) -> tuple[NDArray[np.float64], float]:
    """Return the probability of each length of the last run, [T], from 1, and the logarithm of the evidence.

    There are 2^(T-1) ways to cut T values into runs.
    """
    total = len(values)
    weights = np.full(total, -np.inf)
    for cuts in range(total):
        for starts in combinations(range(1, total), cuts):
            bounds = [0, *starts, total]
            runs = [values[start:end] for start, end in pairwise(bounds)]
            evidence = sum(log_evidence_of_run(run, count, freedom, squares) for run in runs)
            prior = cuts * log(hazard) + (total - 1 - cuts) * log(1 - hazard)
            length = len(runs[-1])
            weights[length - 1] = np.logaddexp(weights[length - 1], prior + evidence)
    evidence = float(np.logaddexp.reduce(weights))
    return np.exp(weights - evidence), evidence
