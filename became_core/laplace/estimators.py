"""Estimators: from what is known of several losses to the quadratic of their sum along directions between models.

Each estimator is a value, so that it can be chosen; all share one interface. They differ in what they ask of a loss:
its diagonal, or its exact derivatives along the directions.

Convention: curvatures are means over samples, like those summed in the posterior.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from became_core.arrays import Array, Params, device, has_values, namespace
from became_core.errors import BecameError
from became_core.laplace.expansion import subspace_quadratic
from became_core.laplace.posterior import offset
from became_core.laplace.quadratic import Quadratic
from became_core.precision import Diagonal

__all__ = [
    "Calibrated",
    "DiagonalFisher",
    "Estimator",
    "LocalLoss",
    "MergeSubspace",
    "NativeExpansion",
    "PaperClosedForm",
    "Secant",
]


class LocalLoss(Protocol):
    """A loss known to second order near one point: a posterior, or a task measured at its weights."""

    @property
    def mean(self) -> Params:
        """The point."""

    def diagonal(self) -> Diagonal:
        """Return the diagonal of its curvature at the point."""

    def along(self, directions: Sequence[Params]) -> Quadratic:
        """Return it along directions from the point, as exactly as it is known: slopes g.d_k, curvature d_k.P.d_l."""

    def slope(self, origin: Params, directions: Sequence[Params]) -> Array:
        """Return its slopes along K directions at another point, [K], as exactly as they are known."""

    def loss(self, theta: Params) -> Array | float:
        """Return its value at a point up to a constant, 0-d, as exactly as it is known."""


class MergeSubspace(NamedTuple):
    """The affine space between models: origin + sum_k a_k d_k.

    Attributes:
        origin: where all coefficients are zero: the first model.
        directions: from it, K of them.
        newest: the coefficients of the last model, at which the last loss is known; K numbers.
    """

    origin: Params
    directions: Sequence[Params]
    newest: Sequence[float]


class Estimator(Protocol):
    """How to estimate the sum of the losses between models.

    Examples:
        >>> import numpy as np
        >>> from became_core import Diagonal, LaplacePosterior
        >>> subspace = MergeSubspace({"w": np.zeros(1)}, [{"w": np.ones(1)}], newest=[1.0])
        >>> old, new = (
        ...     LaplacePosterior({"w": np.array([mean])}, Diagonal({"w": np.array([curvature])}))
        ...     for mean, curvature in ((0.0, 3.0), (1.0, 1.0))
        ... )
        >>> for estimator in (DiagonalFisher(), PaperClosedForm(), Secant()):
        ...     print(estimator.quadratic(subspace, (old, new)).minimiser())
        [0.25]
        [0.25]
        [0.25]
    """

    def quadratic(self, subspace: MergeSubspace, losses: Sequence[LocalLoss]) -> Quadratic:
        """Return the quadratic of the losses' sum in the subspace's coefficients.

        Args:
            subspace: where to look.
            losses: at least two: those of old tasks first, such as their posterior, the new task's last.

        Raises:
            BecameError: if there are fewer than two losses.
        """


@dataclass(frozen=True)
class DiagonalFisher:
    """Every loss by its diagonal, from where it is known; no gradient."""

    def quadratic(self, subspace: MergeSubspace, losses: Sequence[LocalLoss]) -> Quadratic:
        """Return the sum of the losses' diagonal expansions."""
        _check(losses)
        first, *others = (
            subspace_quadratic(subspace.directions, loss.diagonal(), offset=offset(subspace.origin, loss.mean))
            for loss in losses
        )
        return sum(others, first)


@dataclass(frozen=True)
class NativeExpansion:
    """Every loss as exactly as it is known, from where it is known: Kronecker factors of two posteriors, say."""

    def quadratic(self, subspace: MergeSubspace, losses: Sequence[LocalLoss]) -> Quadratic:
        """Return the sum of the losses' own expansions, each with its slope if it knows one."""
        _check(losses)
        first, *others = (_seen_from(subspace, loss) for loss in losses)
        return sum(others, first)


@dataclass(frozen=True)
class PaperClosedForm:
    """The paper's closed form: diagonals, stage 2 converged (g = 0), and the old posterior's mean at theta_gp."""

    def quadratic(self, subspace: MergeSubspace, losses: Sequence[LocalLoss]) -> Quadratic:
        """Return slope -delta.F_new.delta and curvature delta.(F_old + F_new).delta."""
        _check(losses)
        *old, new = losses
        total = subspace_quadratic(subspace.directions, new.diagonal(), offset=offset(subspace.origin, new.mean))
        for loss in old:
            total = total + subspace_quadratic(subspace.directions, loss.diagonal())
        return total


@dataclass(frozen=True)
class Calibrated:
    """The full formula, with the new task's derivatives along the directions exact and the old side calibrated.

    A diagonal underestimates the curvature along delta, two- to eight-fold on convolutional networks. In a ratio of
    two diagonals that cancels; beside an exact curvature it does not. So the old side is scaled by kappa, the exact
    over the diagonal curvature of the new task along this very delta (the way to the last model): the one place
    where both are known.
    """

    def quadratic(self, subspace: MergeSubspace, losses: Sequence[LocalLoss]) -> Quadratic:
        """Return new + kappa * old, the new part having slope g.d - delta.GGN.d at the origin."""
        _check(losses)
        *old, new = losses
        exact = new.along(subspace.directions)
        xp = namespace(slope=exact.slope)
        newest = xp.asarray(list(subspace.newest), dtype=exact.slope.dtype, device=device(exact.slope))
        kappa = _ratio(exact, Quadratic(exact.slope, new.diagonal().gram(subspace.directions)), newest)
        total = Quadratic(exact.slope_at(-newest), exact.curvature)
        for loss in old:
            total = total + _seen_from(subspace, loss) * kappa
        return total


@dataclass(frozen=True)
class Secant:
    """The new task's loss by its true slopes at both ends of the way to the last model, the old side calibrated.

    The curvature at theta_hat need not be that of the way there: where theta_gp has learned the new task already, its
    loss is flat at one end whatever the curvature is at the other. So the slope at the origin is measured, and the
    curvature along the way is the difference of the slopes at its ends; in other directions it is the exact one, scaled
    alike, or none if the exact one along the way is 0 to within rounding, as where the new task has been learned to the
    last digit. The old side is scaled by kappa, as ``Calibrated`` has it.

    No parabola has both slopes if the loss bends down between the models, as over a hill between two that have learned
    the task. Then the slopes do not count, but how far the loss falls from theta_gp to theta_hat does: the new part is
    the parabola with that fall and with its minimum at theta_hat, as the paper assumes of stage 2. A loss that does not
    fall is left out, which keeps the stable model.

    Attributes:
        calibrates: whether kappa is measured here. If not, the old side is used as it is given: its curvature is exact,
            or was calibrated when it was measured.
    """

    calibrates: bool = field(default=True, metadata={"later": True})  # for runs that an earlier version began

    def quadratic(self, subspace: MergeSubspace, losses: Sequence[LocalLoss]) -> Quadratic:
        """Return new + kappa * old, the new part having slope g(theta_gp).d at the origin, or the loss's fall."""
        _check(losses)
        *old, new = losses
        exact = new.along(subspace.directions)
        xp = namespace(slope=exact.slope)
        newest = xp.asarray(list(subspace.newest), dtype=exact.slope.dtype, device=device(exact.slope))
        start, at_newest = new.slope(subspace.origin, subspace.directions), exact.bend(newest)
        rise, bend = xp.sum(newest * (exact.slope - start)), xp.sum(newest * at_newest)
        convex, zero, curvature = rise > 0, xp.zeros_like(bend), rise
        if not (has_values(rise) and bool(convex)):  # to measure the loss takes two passes over the task's samples
            fall = xp.asarray(
                new.loss(subspace.origin) - new.loss(new.mean), dtype=exact.slope.dtype, device=device(exact.slope)
            )
            curvature = xp.where(convex, rise, xp.where(fall > 0, 2 * fall, zero))
        # The exact curvature scales to the one along the way unless it is lost in the rounding of slopes, or so small
        # beside that one that the other directions' would overflow.
        limits = xp.finfo(bend.dtype)
        rounding = 64 * limits.eps * xp.sum(xp.abs(newest * exact.slope)) + limits.smallest_normal / limits.eps
        has_scale = bend > rounding + limits.eps**2 * curvature
        ratio = xp.where(has_scale, curvature / xp.where(has_scale, bend, xp.ones_like(bend)), zero)
        way = newest / xp.sum(newest * newest)
        slope = xp.where(convex, start, xp.where(has_scale, -at_newest * ratio, -way * curvature))
        along_the_way = (way[:, None] * way[None, :]) * curvature
        total = Quadratic(slope, xp.where(has_scale, exact.curvature * ratio, along_the_way))
        kappa: Array | float = 1.0
        if self.calibrates:
            kappa = _ratio(exact, Quadratic(exact.slope, new.diagonal().gram(subspace.directions)), newest)
        for loss in old:
            total = total + _seen_from(subspace, loss) * kappa
        return total


def _check(losses: Sequence[LocalLoss]) -> None:
    if len(losses) < 2:
        raise BecameError(
            f"an estimator of the cumulative loss was given {len(losses)} of its losses; give those of the old tasks, "
            "such as their posterior, and the new task's."
        )


def _ratio(exact: Quadratic, diagonal: Quadratic, point: Array) -> Array:
    """The ratio of two curvatures along the way to a point, 0-d; 1 where the second has none."""
    xp = namespace(point=point)
    above, below = (xp.sum(point * each.bend(point)) for each in (exact, diagonal))
    return xp.where(below > 0, above / xp.where(below > 0, below, xp.ones_like(below)), xp.ones_like(below))


def _seen_from(subspace: MergeSubspace, loss: LocalLoss) -> Quadratic:
    """A loss in the subspace's coefficients: its slope at the origin is that at its own point, plus curvature x way."""
    known = loss.along([*subspace.directions, offset(subspace.origin, loss.mean)])
    return Quadratic(known.slope[:-1] + known.curvature[:-1, -1], known.curvature[:-1, :-1])
