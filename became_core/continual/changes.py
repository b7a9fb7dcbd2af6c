"""When a stream of batches changes: detectors of a rise in the standardised loss, and a bounded sample of the batches.

A detector is a frozen value: ``observe`` returns the next one. It sees one number a batch: how far the loss of the
batch is above that of data that the model knows, in standard deviations (``standardised``). It has no network.

Convention: only a rise is a change. A loss that falls to a lower level is a model that learns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from became_core.continual.rng import random_generator
from became_core.errors import BecameError

__all__ = ["BayesianDetector", "Detector", "PlateauDetector", "Reservoir", "standardised"]

Numbers = NDArray[np.float64]

# Beyond so many standard deviations two losses are equally far. A new level then looks like a level at once, although
# losses of data that the model does not know differ by tens of deviations of the losses that it is used to.
FARTHEST = 10.0


def standardised(loss: float, reference: Sequence[float]) -> float:
    """Return how far a batch's loss is above those of other batches, in their standard deviations, at most 10 of them.

    Args:
        loss: the mean loss of the batch.
        reference: the mean losses of at least two batches of known data, of the same size and by the same weights.

    Raises:
        BecameError: if there are fewer than two, or a loss is not finite.

    Examples:
        >>> standardised(3.0, [0.0, 2.0])
        1.1547005383792517
    """
    if len(reference) < 2:
        raise BecameError(f"a loss is compared with those of {len(reference)} batches; give at least 2.")
    if not np.isfinite([loss, *reference]).all():
        raise BecameError("a loss that is watched for changes is not finite; train with a smaller learning rate.")
    mean, deviation = float(np.mean(reference)), float(np.std(reference, ddof=1))
    # The mean of so few has an error of its own, and losses that are all alike have no deviation.
    deviation = max(deviation * math.sqrt(1 + 1 / len(reference)), 1e-6 * max(abs(mean), 1e-6))
    return float(np.clip((loss - mean) / deviation, -FARTHEST, FARTHEST))


class Detector(Protocol):
    """What decides that a stream has changed."""

    @property
    def changed(self) -> bool:
        """Whether what the model knew no longer holds."""

    @property
    def suspects(self) -> bool:
        """Whether the last batch may be of something new; it had better not be trained on before that is known."""

    @property
    def length(self) -> int:
        """For how many batches, the last one included, the present level has lasted."""

    def observe(self, value: float) -> Self:
        """Return the detector after one more standardised loss."""


@dataclass(frozen=True)
class BayesianDetector:
    """Bayesian online change-point detection (Adams & MacKay 2007, arXiv 0710.3742).

    The standardised losses are normal in each run, with an unknown mean and variance (a normal-gamma prior), and before
    each of them, with the probability ``hazard``, a new run begins. ``observe`` is the recursion of their section 2.2,
    with the posterior of the run's length; so a value far from all others is an outlier until others follow it.

    The decision: a change is announced as soon as, with the probability ``certainty``, the present run has lasted for
    at least ``confirmed`` batches and has a level of at least ``rise``.

    Attributes:
        hazard: the probability that a run begins at a batch, between 0 and 1.
        rise: from which level on a run is something new, in standard deviations.
        certainty: the probability from which on that is announced.
        confirmed: for how many batches such a run must have lasted.
        hypotheses: how many run lengths are followed at most; the least probable ones are given up.
        lengths: integers [H]: the run lengths that are followed.
        log_probability: [H]: of each, given all values so far.
        log_evidence: of all values so far, in nats.
        level: [H]: the posterior mean of each run's level.
        squares: [H]: twice the rate of the gamma distribution of each run's precision.

    Raises:
        BecameError: if a number cannot be used.

    Examples:
        >>> detector = BayesianDetector()
        >>> for value in [0.1, -0.4, 0.3, -0.2, 6.0, 5.5, 6.3, 5.8]:
        ...     detector = detector.observe(value)
        >>> detector.changed, detector.length
        (True, 4)
    """

    hazard: float = 0.01
    rise: float = 2.0
    certainty: float = 0.99
    confirmed: int = 3
    hypotheses: int = 200
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    log_probability: Numbers = field(default_factory=lambda: np.zeros(0))
    log_evidence: float = 0.0
    level: Numbers = field(default_factory=lambda: np.zeros(0))
    squares: Numbers = field(default_factory=lambda: np.zeros(0))

    # The prior of a run: its mean is 0 as precisely as 0.05 values say, and its variance about 1, as 4 values say.
    COUNT, FREEDOM = 0.05, 4.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.hazard < 1:
            raise BecameError(f"the hazard is {self.hazard}; give a probability between 0 and 1.")
        if not 0 < self.certainty < 1:
            raise BecameError(f"the certainty is {self.certainty}; give a probability between 0 and 1.")
        if not 0 < self.rise < FARTHEST:
            raise BecameError(f"the rise is {self.rise} standard deviations; it must be above 0 and below {FARTHEST}.")
        if self.confirmed < 1 or self.hypotheses < 2:
            raise BecameError("a change is confirmed by at least 1 batch, among at least 2 run lengths.")

    def observe(self, value: float) -> Self:
        """Return the detector after one more standardised loss.

        Raises:
            BecameError: if it is not finite.
        """
        if not math.isfinite(value):
            raise BecameError(f"the standardised loss is {value}; it must be finite.")
        # A run of no values yet, beside those that go on. The first value always begins a run.
        lengths = np.append(self.lengths, 0)
        level, squares = np.append(self.level, 0.0), np.append(self.squares, self.FREEDOM)
        before = np.append(self.log_probability + math.log1p(-self.hazard), math.log(self.hazard))
        if not len(self.lengths):
            before = np.zeros(1)
        count, freedom = self.COUNT + lengths, self.FREEDOM + lengths
        joint = before + _log_student(value, level, squares * (count + 1) / (count * freedom), freedom)
        evidence = float(np.logaddexp.reduce(joint))
        squares = squares + count / (count + 1) * (value - level) ** 2
        level = level + (value - level) / (count + 1)
        best = np.sort(np.argsort(-joint, kind="stable")[: self.hypotheses])
        log_probability = joint[best] - np.logaddexp.reduce(joint[best])
        return replace(
            self,
            lengths=lengths[best] + 1,
            log_probability=log_probability,
            log_evidence=self.log_evidence + evidence,
            level=level[best],
            squares=squares[best],
        )

    @property
    def probability(self) -> Numbers:
        """The posterior of the run's length, [H], as of ``lengths``."""
        return np.asarray(np.exp(self.log_probability))

    def risen(self, confirmed: int) -> float:
        """Return the probability of a run that has lasted for so many batches and has a level of at least ``rise``."""
        return float(self.probability[(self.lengths >= confirmed) & (self.level >= self.rise)].sum())

    @property
    def changed(self) -> bool:
        """Whether what the model knew no longer holds."""
        return self.risen(self.confirmed) >= self.certainty

    @property
    def suspects(self) -> bool:
        """Whether the last batch is more probably of a run at a new level than not."""
        return self.risen(1) > 0.5

    @property
    def length(self) -> int:
        """The most probable length of the present run; 0 before the first value."""
        return int(self.lengths[np.argmax(self.log_probability)]) if len(self.lengths) else 0


def _log_student(value: float, location: Numbers, scale: Numbers, freedom: Numbers) -> Numbers:
    """Return the logarithms of densities of Student's t; ``scale`` is that of squares."""
    constant = np.array([math.lgamma((f + 1) / 2) - math.lgamma(f / 2) for f in freedom])
    spread = freedom * scale
    return np.asarray(
        constant - 0.5 * np.log(np.pi * spread) - (freedom + 1) / 2 * np.log1p((value - location) ** 2 / spread)
    )


@dataclass(frozen=True)
class PlateauDetector:
    """Plateaus and peaks of a window of losses (Aljundi, Kelchtermans & Tuytelaars, CVPR 2019, section 3.2).

    A plateau is a window whose mean and variance are small. A peak is a window, after a plateau, whose mean is above
    that of the plateau by more than its standard deviation: it says that there is something new. A plateau must come
    before the next peak. Their thresholds are of losses; these are of standardised ones.

    Attributes:
        window: how many values a window has.
        mean: below which mean a window can be a plateau.
        variance: below which variance.
        values: the values of the present window.
        plateau: the mean and variance of the last plateau; None before the first.
        changed: whether the window is a peak.

    Raises:
        BecameError: if the window has fewer than two values, or the variance is not above 0.

    Examples:
        >>> detector = PlateauDetector()
        >>> for value in [0.1, -0.4, 0.3, -0.2, 0.0, 6.0]:
        ...     detector = detector.observe(value)
        >>> detector.changed
        True
    """

    window: int = 5
    mean: float = 1.0
    variance: float = 2.0
    values: tuple[float, ...] = ()
    plateau: tuple[float, float] | None = None
    changed: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.window < 2 or not self.variance > 0:
            raise BecameError("a plateau's window has at least 2 values, and its variance is above 0.")

    def observe(self, value: float) -> Self:
        """Return the detector after one more standardised loss."""
        values = (*self.values, value)[-self.window :]
        if len(values) < self.window:
            return replace(self, values=values)
        mean, variance = float(np.mean(values)), float(np.var(values))
        if self.plateau is not None and mean > self.plateau[0] + math.sqrt(self.plateau[1]):
            return replace(self, values=values, changed=True)
        if mean < self.mean and variance < self.variance:
            return replace(self, values=values, plateau=(mean, variance), changed=False)
        return replace(self, values=values, changed=False)

    @property
    def suspects(self) -> bool:
        """Whether there is a peak; the rule knows no degrees."""
        return self.changed

    @property
    def length(self) -> int:
        """How many of the window's last values are above the plateau; 1 at least, and 0 before the first value."""
        if not self.values or self.plateau is None:
            return len(self.values)
        limit = self.plateau[0] + math.sqrt(self.plateau[1])
        below = [place for place, value in enumerate(self.values, 1) if value <= limit]
        return max(len(self.values) - max(below, default=0), 1)


@dataclass(frozen=True)
class Reservoir:
    """A bounded sample of all batches of a stream so far, each with the same chance (Vitter 1985, algorithm R).

    Attributes:
        capacity: how many batches are stored.
        seed: of the draws, which are a function of it, ``key`` and the number of the batch alone.
        key: tells the reservoirs of one seed apart.
        batches: those that are stored.
        offered: how many batches there were.

    Raises:
        BecameError: if nothing could be stored.

    Examples:
        >>> reservoir = Reservoir(2)
        >>> for batch in "abcdef":
        ...     reservoir = reservoir.offer(batch)
        >>> len(reservoir.batches), reservoir.offered
        (2, 6)
    """

    capacity: int
    seed: int = 0
    key: int = 0
    batches: tuple[Any, ...] = ()
    offered: int = 0

    def __post_init__(self) -> None:
        """Check the capacity."""
        if self.capacity < 1:
            raise BecameError(f"a reservoir of {self.capacity} batches holds nothing; let it hold at least 1.")

    @property
    def full(self) -> bool:
        """Whether as many batches are stored as can be."""
        return len(self.batches) == self.capacity

    def offer(self, batch: Any) -> Self:
        """Return the reservoir after one more batch, which may have taken the place of another."""
        offered = self.offered + 1
        if not self.full:
            return replace(self, batches=(*self.batches, batch), offered=offered)
        place = int(random_generator(self.seed, "reservoir", self.key, offered).integers(offered))
        if place >= self.capacity:
            return replace(self, offered=offered)
        return replace(self, batches=(*self.batches[:place], batch, *self.batches[place + 1 :]), offered=offered)
