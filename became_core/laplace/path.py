"""The true loss on the segment between two models, and the report that holds the predicted quadratic against it.

Convention: losses are those of whatever callable traced them; a quadratic is compared up to a constant, at alpha = 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Tree
from became_core.errors import BecameError
from became_core.laplace.merge import merge
from became_core.laplace.quadratic import Quadratic

__all__ = ["PathReport", "TracedPath", "compare", "finite_losses", "trace_path"]


class TracedPath(NamedTuple):
    """What was found along a path: the points, and the value at each, of whatever type the loss returns."""

    alphas: Sequence[float]
    values: list[Any]


def trace_path(loss: Callable[[Tree], Any], theta_gp: Tree, theta_hat: Tree, alphas: Sequence[float]) -> TracedPath:
    """Return ``loss(merge(theta_gp, theta_hat, alpha))`` for each alpha, in order.

    Args:
        loss: the loss of a tree of weights.
        theta_gp: the weights at alpha = 0.
        theta_hat: the weights at alpha = 1.
        alphas: where to look; a grid over [0, 1], or beyond.
    """
    return TracedPath(alphas, [loss(merge(theta_gp, theta_hat, alpha)) for alpha in alphas])


def finite_losses(traced: TracedPath) -> list[float]:
    """Return the losses along a path as numbers.

    Args:
        traced: numbers, or 0-d arrays.

    Raises:
        BecameError: if one of them is infinite or not a number, which has no place among others.
    """
    losses = [float(value) for value in traced.values]
    for alpha, loss in zip(traced.alphas, losses, strict=True):
        if not math.isfinite(loss):
            raise BecameError(
                f"the loss at alpha = {float(alpha):g} is {loss}; it must be finite, so look for NaN in the data and "
                "the weights."
            )
    return losses


@dataclass(frozen=True)
class PathReport:
    """How well a quadratic predicts a traced path.

    Attributes:
        predicted_minimiser: alpha*, the quadratic's minimiser in [0, 1].
        true_minimiser: the traced point with the lowest loss (the first of equals).
        regret: the true loss at alpha*, on the parabola through the three traced points around it, minus the lowest.
        predicted_slopes: the quadratic's derivatives at alpha = 0 and 1.
        true_slopes: the truth's at the first and the last point, on the parabola through the three points there.
        plasticity_predicted: whether the quadratic's slopes have opposite signs, so that the theorem promises an
            interior optimum better than both ends.
        plasticity_holds: whether the truth has such an optimum among its points.
        convexity_violations: the inner points at which the truth bends down: where it lies above the chord between its
            neighbours, by more than rounding.
        r_squared: the share of the truth's variance over the points that the quadratic explains, a constant aside;
            1 is perfect, below 0 is worse than a horizontal line.
    """

    predicted_minimiser: float
    true_minimiser: float
    regret: float
    predicted_slopes: tuple[float, float]
    true_slopes: tuple[float, float]
    plasticity_predicted: bool
    plasticity_holds: bool
    convexity_violations: tuple[float, ...]
    r_squared: float


def compare(quadratic: Quadratic, traced: TracedPath) -> PathReport:
    """Return the report on a predicted quadratic of one direction and the true loss along it.

    Args:
        quadratic: what was predicted.
        traced: numbers, or 0-d arrays, at three or more ascending points.

    Raises:
        BecameError: if the quadratic has several directions, there are too few points or not in order, or a loss is not
            finite.
    """
    if quadratic.directions != 1:
        raise BecameError(f"a path has one direction; the quadratic has {quadratic.directions}.")
    alphas = np.asarray(traced.alphas, dtype=float)
    losses = np.array(finite_losses(traced))
    if len(alphas) < 3 or np.any(np.diff(alphas) <= 0):
        raise BecameError("a path is compared at three or more points in ascending order.")
    slope, curvature = float(quadratic.slope[0]), float(quadratic.curvature[0, 0])
    alpha = float(quadratic.minimiser("box")[0])
    predicted = slope * alphas + 0.5 * curvature * alphas**2
    best = int(losses.argmin())
    at_alpha, _ = _parabola(alphas, losses, alpha)
    interior = losses[1:-1].min() < min(losses[0], losses[-1])
    return PathReport(
        predicted_minimiser=alpha,
        true_minimiser=float(alphas[best]),
        regret=at_alpha - float(losses[best]),
        predicted_slopes=(slope, slope + curvature),
        true_slopes=(_parabola(alphas, losses, alphas[0])[1], _parabola(alphas, losses, alphas[-1])[1]),
        plasticity_predicted=slope < 0 < slope + curvature,
        plasticity_holds=bool(interior),
        convexity_violations=_bends_down(alphas, losses),
        r_squared=_explained(losses, predicted),
    )


def _parabola(alphas: NDArray[np.float64], losses: NDArray[np.float64], at: float) -> tuple[float, float]:
    """Return value and slope at a point, on the parabola through the three traced points nearest to it."""
    middle = int(np.clip(np.abs(alphas - at).argmin(), 1, len(alphas) - 2))
    x, y = alphas[middle - 1 : middle + 2], losses[middle - 1 : middle + 2]
    first, second = np.diff(y) / np.diff(x)
    bend = (second - first) / (x[2] - x[0])
    value = y[0] + first * (at - x[0]) + bend * (at - x[0]) * (at - x[1])
    return float(value), float(first + bend * (2 * at - x[0] - x[1]))


def _bends_down(alphas: NDArray[np.float64], losses: NDArray[np.float64]) -> tuple[float, ...]:
    share = (alphas[1:-1] - alphas[:-2]) / (alphas[2:] - alphas[:-2])
    chord = (1 - share) * losses[:-2] + share * losses[2:]
    rounding = 1e-6 * np.abs(losses).max()  # losses are float32 at most places
    return tuple(alphas[1:-1][losses[1:-1] - chord > rounding].tolist())


def _explained(losses: NDArray[np.float64], predicted: NDArray[np.float64]) -> float:
    spread = losses - losses.mean()
    error = spread - (predicted - predicted.mean())
    total = float(spread @ spread)
    return 1.0 - float(error @ error) / total if total > 0 else float(not error.any())
