"""What every estimator of alpha would have said at a merge: the loss along delta, measured in every way there is.

Along theta_gp + alpha delta, each side's loss is a slope at 0 and a curvature. The new task's is measured at theta_hat
(with or without its gradient there) and by the secant of its slopes at both ends; the old tasks' as the posterior has
it, by diagonal or Kronecker factors, and, for reference, exactly, from data that a continual learner no longer has. The
approximate old sides may be calibrated by kappa, the new task's exact curvature over the same approximation of it.

Convention: means over samples; ``batch`` is the published code's Fisher estimate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from became_core.arrays import Params, difference
from became_core.continual.measurement import Measurement
from became_core.laplace import LaplacePosterior, Precision, Quadratic

__all__ = ["Along", "Approximations", "alpha_estimates", "new_sides", "old_sides"]


@dataclass(frozen=True)
class Along:
    """One loss along delta: its slope at theta_gp and its curvature."""

    slope: float
    curvature: float


@dataclass(frozen=True)
class Approximations:
    """Curvatures of the old tasks that the posterior itself does not keep: sums over tasks, for comparison alone."""

    batch: Precision
    kronecker: Precision

    @classmethod
    def of(cls, measurement: Measurement) -> Self:
        """Return those of one task, measured at the learner's weights."""
        batch = replace(measurement, kind="batch").diagonal()
        return cls(batch, replace(measurement, kind="empirical").kronecker())

    def __add__(self, other: Self) -> Self:
        """Return those of both."""
        return replace(self, batch=self.batch + other.batch, kronecker=self.kronecker + other.kronecker)


def new_sides(measurement: Measurement, theta_gp: Params) -> dict[str, Along]:
    """Return the new task's loss along delta in every way; the learner is at theta_hat, and is left there."""
    theta_hat = measurement.mean
    delta = difference(theta_hat, theta_gp)
    exact = measurement.along([delta])
    gradient, curvature = float(exact.slope[0]), float(exact.curvature[0, 0])
    slope = float(measurement.slope(theta_gp, [delta])[0])
    sides = {
        "exact": Along(-curvature, curvature),
        "exact, with gradient": Along(gradient - curvature, curvature),
        "secant": Along(slope, gradient - slope),
    }
    empirical = replace(measurement, kind="empirical")
    approximations: dict[str, Precision] = {
        "batch": replace(measurement, kind="batch").diagonal(),
        "diagonal": empirical.diagonal(),
        "kronecker": empirical.kronecker(),
    }
    head = measurement.learner.heads[measurement.task.index]
    shared = {name: value * 0 if name in head else value for name, value in delta.items()}
    sides |= {name: _around(precision, delta) for name, precision in approximations.items()}
    return sides | {"diagonal, without head": _around(approximations["diagonal"], shared)}


def _around(precision: Precision, delta: Params) -> Along:
    """A loss known by its curvature at theta_hat, where it is at its minimum."""
    curvature = float(precision.gram([delta])[0, 0])
    return Along(-curvature, curvature)


def old_sides(
    posterior: LaplacePosterior,
    approximations: Approximations,
    measurements: Sequence[Measurement],
    theta_gp: Params,
    theta_hat: Params,
) -> dict[str, Along]:
    """Return the old tasks' loss along delta in every way.

    Args:
        posterior: of the old tasks.
        approximations: of the old tasks.
        measurements: of the old tasks, one each, on their own data.
        theta_gp: the stable weights.
        theta_hat: the plastic weights.
    """
    delta, offset = difference(theta_hat, theta_gp), difference(theta_gp, posterior.mean)
    precisions: dict[str, Precision] = {
        "diagonal": posterior.diagonal(),
        "kronecker": approximations.kronecker,
        "batch": approximations.batch,
    }
    sides = {}
    for name, precision in precisions.items():
        gram = precision.gram([delta, offset])
        sides[name] = Along(float(gram[0, 1]), float(gram[0, 0]))
    slope = curvature = 0.0
    for measurement in measurements:
        found = measurement.along([delta], theta_gp)
        slope, curvature = slope + float(found.slope[0]), curvature + float(found.curvature[0, 0])
    return sides | {"exact": Along(slope, curvature)}


def alpha_estimates(new: Mapping[str, Along], old: Mapping[str, Along]) -> dict[str, float]:
    """Return alpha by the name of its estimator.

    The published form (``published, batch`` and so on) is two diagonals, the old tasks at their minimum at theta_gp.
    All others are named ``new side / old side``, with `` x kappa`` where the old side is calibrated and
    ``, at its minimum`` where its slope at theta_gp is left out.
    """
    found = {f"published, {name}": _alpha(new[name], _flat(old[other])) for name, other in _PUBLISHED.items()}
    for left in ("diagonal", "kronecker", "exact", "exact, with gradient", "secant"):
        for right in ("diagonal", "kronecker", "exact"):
            side = old[right]
            kappas = {"": 1.0}
            if right != "exact" and new[right].curvature > 0:
                kappas[" x kappa"] = new["exact"].curvature / new[right].curvature
            for suffix, kappa in kappas.items():
                scaled = Along(kappa * side.slope, kappa * side.curvature)
                found[f"{left} / {right}{suffix}"] = _alpha(new[left], scaled)
                found[f"{left} / {right}{suffix}, at its minimum"] = _alpha(new[left], _flat(scaled))
    return found


# The published form by new side, and the old side beside it.
_PUBLISHED = {"batch": "batch", "diagonal": "diagonal", "diagonal, without head": "diagonal"}


def _flat(side: Along) -> Along:
    return Along(0.0, side.curvature)


def _alpha(new: Along, old: Along) -> float:
    """The minimum of the sum, in [0, 1]; 0 where it is flat."""
    slope, curvature = new.slope + old.slope, new.curvature + old.curvature
    return float(Quadratic(np.asarray([slope]), np.asarray([[curvature]])).minimiser("box")[0])
