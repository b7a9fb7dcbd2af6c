"""Statistics over seeds: means, standard deviations, paired differences, bootstrap intervals.

Convention: a run is one observation, named by its seed; the standard deviation divides by n - 1. An interval is the
percentile bootstrap's (Efron 1979): the middle share of the means of resampled runs, drawn from a stream that depends
on their number alone, so that equal results give equal intervals. Of a few seeds it is too narrow: the number is said
beside it, and of one there is none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from became_core import BecameError
from became_core.continual import random_generator

__all__ = ["Estimate", "estimate", "paired_difference"]

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    Attributes:
        mean: of the runs.
        count: how many there are.
        deviation: their standard deviation; None of one run.
        interval: the bootstrap interval of the mean; None of one run.
    """

    mean: float
    count: int
    deviation: float | None = None
    interval: tuple[float, float] | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of some runs' values, with what is known of how far to trust it.

    Raises:
        BecameError: if there are none.
    """
    if not values:
        raise BecameError("there are no runs to take a mean of.")
    numbers = np.asarray(values, dtype=float)
    count = len(numbers)
    if count == 1:
        return Estimate(float(numbers[0]), 1)
    rows = random_generator(0, "bootstrap", count).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(numbers[rows].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(numbers.mean()), count, float(numbers.std(ddof=1)), (float(low), float(high)))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Return the mean difference from a baseline over the seeds that both have, by seed; None if there is none."""
    common = sorted(set(values) & set(baseline))
    return estimate([values[seed] - baseline[seed] for seed in common]) if common else None
