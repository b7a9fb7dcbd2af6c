"""Statistics over seeds: means, standard deviations, paired differences, bootstrap intervals.

Convention: a run is one observation, named by its seed; the standard deviation divides by n - 1. An interval is the
percentile bootstrap's (Efron 1979): the middle 95 % of the means of resampled runs. The resamples are drawn from a
generator that depends on the number of runs alone, so that equal results give equal intervals. For a few seeds the
interval is too narrow, and for one seed there is none; tables therefore state the number of seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from became_core import BecameError
from became_core.continual import random_generator

__all__ = ["LEVEL", "RESAMPLES", "Estimate", "paired_difference"]

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """The mean of one number over runs, and how far to trust it.

    >>> Estimate((88.0, 90.0)).text()
    '89.00 ± 1.41'
    >>> Estimate((88.0,)).text(1)
    '88.0'

    Attributes:
        values: the number in each run.
        digits: how many after the point a table shows; None for as many as its column has.

    Raises:
        BecameError: if there are no runs.
    """

    values: tuple[float, ...]
    digits: int | None = None

    def __post_init__(self) -> None:
        """Check that there is at least one run."""
        if not self.values:
            raise BecameError("there are no runs to take a mean of.")

    @property
    def count(self) -> int:
        """The number of runs."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The mean over the runs."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the runs; None for one run."""
        return float(np.std(self.values, ddof=1)) if self.count > 1 else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The bootstrap interval of the mean; None for one run."""
        if self.count == 1:
            return None
        rows = random_generator(0, "bootstrap", self.count).integers(self.count, size=(RESAMPLES, self.count))
        means = np.asarray(self.values)[rows].mean(axis=1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def text(self, digits: int = 2, *, interval: bool = False) -> str:
        """Return ``mean ± deviation``, or ``mean [low, high]`` if ``interval``; the mean alone for one run.

        Args:
            digits: the number of digits after the point.
            interval: whether to show the interval in place of the standard deviation.
        """
        mean = f"{self.mean:.{digits}f}"
        if interval and self.interval is not None:
            low, high = self.interval
            return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"
        return mean if interval or self.deviation is None else f"{mean} ± {self.deviation:.{digits}f}"


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Return the mean difference from a baseline over the seeds that both have; None if they have none in common.

    Args:
        values: a number by seed.
        baseline: the same number of the baseline, by seed.
    """
    common = sorted(set(values) & set(baseline))
    return Estimate(tuple(values[seed] - baseline[seed] for seed in common)) if common else None
