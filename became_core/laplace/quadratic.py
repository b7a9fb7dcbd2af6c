"""The quadratic along a direction: the sufficient statistic of merging (BECAME, Sections 3.2 and 3.3).

Along theta_gp + alpha * delta, with delta = theta_hat - theta_gp, the Laplace cumulative loss is, up to a constant,

    q(alpha) = slope * alpha + 1/2 * curvature * alpha**2

    slope     = g.delta - delta.H_new.delta + (theta_gp - mean).P_old.delta
    curvature = delta.(P_old + H_new).delta

where g and H_new are the new task's gradient and curvature at theta_hat and N(mean, P_old^-1) is the posterior of the
old tasks. Its minimiser is alpha* = -slope / curvature. With g = 0 and mean = theta_gp this is the paper's closed form
alpha* = delta.H_new.delta / delta.(P_old + H_new).delta.

Convention: quadratics add, over leaves, layers, shards and tasks. The unit of the loss (a mean or a sum over samples)
is the caller's; alpha* needs it to be the same in every term.
"""

from dataclasses import dataclass
from typing import Any

from became_core.arrays import Array, Tree, aligned_leaves, check_values, namespace, reduction_dtype
from became_core.errors import BecameError

__all__ = ["Quadratic", "path_quadratic"]


@dataclass(frozen=True)
class Quadratic:
    """A loss along one direction, up to a constant: ``slope * alpha + curvature * alpha**2 / 2``; both 0-d arrays."""

    slope: Array
    curvature: Array

    def __add__(self, other: "Quadratic") -> "Quadratic":
        """Return the quadratic of the sum of the two losses."""
        return Quadratic(self.slope + other.slope, self.curvature + other.curvature)

    def __mul__(self, factor: Array) -> "Quadratic":
        """Return the quadratic of the loss times a number."""
        return Quadratic(self.slope * factor, self.curvature * factor)

    def value(self, alpha: Array) -> Array:
        """Return the change of the loss from alpha = 0 to this alpha."""
        return self.slope * alpha + 0.5 * self.curvature * alpha * alpha

    def slope_at(self, alpha: Array) -> Array:
        """Return the derivative at this alpha."""
        return self.slope + self.curvature * alpha

    @property
    def is_convex(self) -> Array:
        """Whether the loss is convex along the path: true wherever both curvatures are positive semi-definite."""
        return self.curvature >= 0

    @property
    def has_interior_optimum(self) -> Array:
        """Whether slopes of opposite sign at the ends put the optimum between them (the plasticity theorem)."""
        return (self.slope < 0) & (self.slope_at(1.0) > 0)

    def minimiser(self, *, clip: bool = True) -> Array:
        """Return alpha*, a 0-d array.

        Args:
            clip: minimise over [0, 1]. A concave or linear quadratic then has its minimum at an end; a constant one
                gives 0, the stable model. Without it, the stationary point, and 0 where there is no curvature.
        """
        xp = namespace(slope=self.slope, curvature=self.curvature)
        zero, one = xp.zeros_like(self.slope), xp.ones_like(self.slope)
        # `not (c <= 0)` rather than `c > 0`: what is not a number must not pass for "no curvature".
        curved = xp.logical_not(self.curvature <= 0) if clip else self.curvature != 0
        # The inner `where` keeps the branch not taken finite: its infinite gradient would poison the one that is.
        stationary = -self.slope / xp.where(curved, self.curvature, one)
        if not clip:
            return xp.where(curved, stationary, zero)
        better_end = xp.where(self.value(one) < 0, one, zero)
        return xp.where(curved, xp.clip(stationary, 0.0, 1.0), better_end)


def path_quadratic(
    theta_gp: Tree,
    theta_hat: Tree,
    fisher_old: Tree,
    fisher_new: Tree,
    *,
    gradient: Tree | None = None,
    mean: Tree | None = None,
) -> Quadratic:
    """Return the Laplace cumulative loss on the segment from theta_gp to theta_hat, for diagonal curvatures.

    Args:
        theta_gp: the stable weights (stage 1), an array or a tree of arrays.
        theta_hat: the plastic weights (stage 2), of the same structure and shapes, like all that follow.
        fisher_old: the diagonal precision of the old tasks' posterior.
        fisher_new: the diagonal curvature of the new task at theta_hat, in the same unit (means over samples, say).
        gradient: the new task's gradient at theta_hat; zero if not given (stage 2 converged).
        mean: the old posterior's mean; theta_gp if not given.

    Raises:
        BecameError: if structures, shapes or frameworks differ, or a curvature is negative or not a number.
    """
    trees = {"theta_gp": theta_gp, "theta_hat": theta_hat, "fisher_old": fisher_old, "fisher_new": fisher_new}
    trees |= {"gradient": gradient} if gradient is not None else {}
    trees |= {"mean": mean} if mean is not None else {}
    total = None
    for leaf in aligned_leaves(**trees):
        part = _leaf_quadratic(leaf, has_gradient=gradient is not None, has_mean=mean is not None)
        total = part if total is None else total + part
    if total is None:
        raise BecameError("theta_gp has no arrays; give at least one.")
    return total


def _leaf_quadratic(leaf: dict[str, Array], *, has_gradient: bool, has_mean: bool) -> Quadratic:
    xp = namespace(**leaf)
    dtype = reduction_dtype(xp, **leaf)
    labels = list(leaf)
    arrays = [xp.astype(array, dtype, copy=False) for array in leaf.values()]
    theta_gp, theta_hat, fisher_old, fisher_new, *rest = arrays
    check_diagonal(xp, labels[2], fisher_old)
    check_diagonal(xp, labels[3], fisher_new)
    delta = theta_hat - theta_gp
    new = xp.sum(delta * delta * fisher_new)
    old = xp.sum(delta * delta * fisher_old)
    slope = -new
    if has_gradient:
        slope = slope + xp.sum(rest[0] * delta)
    if has_mean:
        slope = slope + xp.sum((theta_gp - rest[-1]) * fisher_old * delta)
    return Quadratic(slope, old + new)


def check_diagonal(xp: Any, label: str, values: Array) -> None:
    """Raise a BecameError that names the array if an entry is negative or not a number."""
    # `not (x >= 0)` rather than `x < 0`: the comparison is false for a NaN too.
    check_values(
        xp.all(values >= 0), f"{label} has negative or NaN entries; a curvature's diagonal must be at least 0."
    )
