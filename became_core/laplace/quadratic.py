"""The quadratic along directions: the sufficient statistic of merging (BECAME, Sections 3.2 and 3.3).

Along theta_0 + sum_k a_k d_k a loss known to second order is, up to a constant,

    q(a) = b.a + 1/2 a.C.a        slope b [K], curvature C [K, K]

Everything about a merge is read off it: its minimiser (alpha*, for the one direction delta = theta_hat - theta_gp),
convexity, the slopes at both ends, the gain to expect. Quadratics add: over leaves, layers, shards and tasks.

Convention: the unit of the loss (a mean or a sum over samples) is the caller's, and is the same in every term.
"""

from dataclasses import dataclass
from typing import Any, Literal

from became_core.arrays import Array, device, namespace, pytree
from became_core.errors import BecameError
from became_core.laplace.constraints import free_minimiser, minimise_in_box, minimise_on_simplex
from became_core.laplace.faces import check_finite, is_positive

__all__ = ["CONSTRAINTS", "Constrained", "Quadratic"]

# None: anywhere. "box": each coefficient in [0, 1]. "simplex": none negative, and their sum 1.
Constrained = Literal["box", "simplex"] | None
CONSTRAINTS = (None, "box", "simplex")


@pytree
@dataclass(frozen=True)
class Quadratic:
    """A loss along K directions, up to a constant: ``b.a + 1/2 a.C.a``.

    Attributes:
        slope: b, the derivatives at a = 0, [K].
        curvature: C, symmetric, [K, K].

    Raises:
        BecameError: if the shapes are not [K] and [K, K] with K at least 1.
    """

    slope: Array
    curvature: Array

    def __post_init__(self) -> None:
        """Check the shapes."""
        namespace(slope=self.slope, curvature=self.curvature)
        slope, curvature = tuple(self.slope.shape), tuple(self.curvature.shape)
        if len(slope) != 1 or slope[0] < 1 or curvature != slope * 2:
            raise BecameError(f"a quadratic has slope {slope} and curvature {curvature}; give [K] and [K, K].")

    @property
    def directions(self) -> int:
        """How many directions there are, K."""
        return int(self.slope.shape[0])

    def __add__(self, other: "Quadratic") -> "Quadratic":
        """Return the quadratic of the sum of the two losses."""
        return Quadratic(self.slope + other.slope, self.curvature + other.curvature)

    def __mul__(self, factor: Array | float) -> "Quadratic":
        """Return the quadratic of the loss times a number."""
        return Quadratic(self.slope * factor, self.curvature * factor)

    def value(self, a: Array | float) -> Array:
        """Return the change of the loss from a = 0 to this point [K] (or to each of [..., K]; a number means [1])."""
        point = self._point(a)
        xp = namespace(a=point)
        return xp.sum(point * (self.slope + 0.5 * self._bend(point)), axis=-1)

    def slope_at(self, a: Array | float) -> Array:
        """Return the gradient b + C a at this point, [K] (or at each of [..., K]; a number means [1])."""
        return self.slope + self._bend(self._point(a))

    @property
    def is_convex(self) -> Array:
        """Whether the loss is convex along the directions, as wherever all curvatures are positive semi-definite.

        Up to rounding: the least eigenvalue may be as far below zero as the largest one's last few digits.

        Raises:
            BecameError: if there are several directions and something is not finite.
        """
        xp = namespace(curvature=self.curvature)
        if self.directions == 1:
            return self.curvature[0, 0] >= 0
        check_finite(self.slope, self.curvature)
        return is_positive(self.curvature, self.directions * xp.finfo(self.curvature.dtype).eps)

    @property
    def has_interior_optimum(self) -> Array:
        """Whether the optimum lies strictly inside the box.

        For one direction: whether slopes of opposite sign at the ends put it between them, better than both (the
        plasticity theorem).
        """
        xp = namespace(slope=self.slope)
        if self.directions == 1:
            return (self.slope[0] < 0) & (self.slope_at(1.0)[0] > 0)
        free = free_minimiser(self.slope, self.curvature)
        return xp.all((free > 0) & (free < 1)) & self.is_convex

    def minimiser(self, constraint: Constrained = None) -> Array:
        """Return the coefficients a* at which the loss is smallest, [K].

        Args:
            constraint: None for anywhere (the stationary point), "box" for [0, 1] each, "simplex" for non-negative
                coefficients with sum 1. Where nothing is curved or sloped, all zero; on the simplex, all on the first.

        Raises:
            BecameError: for an unknown constraint; with several directions, where something is not finite; with more
                than 5 in the box or 9 on the simplex, where the loss is not convex there. Under a trace the result is
                then NaN.
        """
        if constraint is None:
            return free_minimiser(self.slope, self.curvature)
        if constraint == "box":
            return minimise_in_box(self.slope, self.curvature)
        if constraint == "simplex":
            return minimise_on_simplex(self.slope, self.curvature)
        raise BecameError(f"there is no constraint '{constraint}'; give None, 'box' or 'simplex'.")

    def predicted_gain(self, constraint: Constrained = "box") -> Array:
        """Return how much smaller the loss is at the minimiser than at a = 0, a 0-d array, at least 0 in the box."""
        return -self.value(self.minimiser(constraint))

    def _point(self, a: Any) -> Array:
        if not isinstance(a, int | float):
            return a
        if self.directions > 1:
            raise BecameError(f"a point of {self.directions} directions is an array [{self.directions}], not a number.")
        xp = namespace(slope=self.slope)
        return xp.full((1,), float(a), dtype=self.slope.dtype, device=device(self.slope))

    def _bend(self, point: Array) -> Array:
        """C a, for each point."""
        xp = namespace(point=point, curvature=self.curvature)
        return xp.sum(self.curvature * xp.expand_dims(point, axis=-2), axis=-1)
