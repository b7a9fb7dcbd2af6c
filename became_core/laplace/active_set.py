"""The active-set method for the box and the simplex (Nocedal & Wright, Numerical Optimization, Algorithm 16.3).

From a corner, always downhill: to the stationary point of the present face, or as far as a bound lets; there, one more
coefficient is held. Where a face's own minimum is reached, the coefficient whose bound costs most is let go. Finite,
and exact, for a convex quadratic.

What is free is told by masks, so a step is the same whether values can be looked at or not. Where they can, the walk
ends where it arrives; under a trace it takes as many steps as should do, and stands still once it is there. Derivatives
are those of the last face: which face that is has none.

Convention: slope [K], curvature [K, K], points [K]; a mask [K] is 1 for a coefficient that is free, 0 for one held.
"""

from typing import Protocol

from became_core.arrays import Array, check_values, has_values, namespace, repeated
from became_core.errors import BecameError
from became_core.laplace.faces import box_face, first_least, rounding_of, simplex_face

__all__ = ["Box", "Simplex", "walk"]


class _Region(Protocol):
    """A feasible region, and a quadratic to minimise in it.

    Attributes:
        slope: b.
        curvature: C.
        highest: the upper bound of a coefficient; the lower one is 0.
        steps: how many a walk takes under a trace: half as many again as any of 12,000 random problems of 6 to 60
            directions needed, of full and low rank, diagonal, and with directions that coincide.
    """

    slope: Array
    curvature: Array
    highest: float
    steps: int

    def across(self) -> Array:
        """Return the curvature [K, K] along the differences between points of the region."""

    def start(self) -> tuple[Array, Array]:
        """Return the corner where the walk begins, and what is free there."""

    def target(self, point: Array, free: Array) -> Array:
        """Return the stationary point of the face with these free coefficients, the others held where they are."""

    def pull(self, point: Array, free: Array) -> Array:
        """Return how strongly the loss pulls each held coefficient off its bound, into the region."""


class Box:
    """0 <= a <= 1."""

    highest = 1.0

    def __init__(self, slope: Array, curvature: Array) -> None:
        """Keep the quadratic."""
        self.slope, self.curvature = slope, curvature
        self.steps = 4 * int(slope.shape[0]) + 8

    def across(self) -> Array:
        """All of it: points may differ in any direction."""
        return self.curvature

    def start(self) -> tuple[Array, Array]:
        """Begin at 0, where all are held."""
        xp = namespace(slope=self.slope)
        return xp.zeros_like(self.slope), xp.zeros_like(self.slope)

    def target(self, point: Array, free: Array) -> Array:
        """Solve for the free coefficients; the others stay at 0 or 1, which no derivative moves."""
        xp = namespace(point=point)
        held = (1 - free) * xp.astype(point > 0.5, point.dtype)
        return box_face(self.slope, self.curvature, free[None, :], held[None, :])[0, :]

    def pull(self, point: Array, free: Array) -> Array:
        """Upwards at 0, downwards at 1."""
        xp = namespace(point=point)
        gradient = self.slope + xp.matmul(self.curvature, point)
        return xp.where(point > 0.5, gradient, -gradient)


class Simplex:
    """a >= 0 with sum 1."""

    highest = 2.0  # not reached: the sum is 1

    def __init__(self, slope: Array, curvature: Array) -> None:
        """Keep the quadratic."""
        self.slope, self.curvature = slope, curvature
        self.steps = 2 * int(slope.shape[0]) + 8

    def across(self) -> Array:
        """Without what only the sum of the coefficients feels."""
        xp = namespace(curvature=self.curvature)
        by_row = self.curvature - xp.mean(self.curvature, axis=0, keepdims=True)
        return by_row - xp.mean(by_row, axis=1, keepdims=True)

    def start(self) -> tuple[Array, Array]:
        """Begin at the best corner, with its coefficient free, so that the sum can stay 1."""
        xp = namespace(slope=self.slope)
        corner = first_least(self.slope + 0.5 * xp.linalg.diagonal(self.curvature))
        return corner, corner

    def target(self, point: Array, free: Array) -> Array:
        """Solve for the free coefficients, whose sum is 1; the others are 0."""
        return simplex_face(self.slope, self.curvature, free[None, :])[0, :]

    def pull(self, point: Array, free: Array) -> Array:
        """Where the gradient is lower than that of the free coefficients, which is one and the same."""
        xp = namespace(point=point)
        gradient = self.slope + xp.matmul(self.curvature, point)
        return xp.sum(first_least(-free) * gradient) - gradient


def walk(region: _Region) -> Array:
    """Return the minimiser in a region, [K]; under a trace NaN where it is not found.

    Raises:
        BecameError: if the loss is not convex in the region, or the minimiser is not found.
    """
    xp = namespace(slope=region.slope)
    least = xp.min(xp.linalg.eigvalsh(region.across()))
    rounding, largest = rounding_of(region.slope), xp.max(xp.abs(region.curvature))
    convex, flat = least >= -rounding * largest, rounding * (largest + xp.max(xp.abs(region.slope)))
    if not has_values(region.slope):
        first = _step(region, flat, *region.start())
        point, free, changes = repeated(lambda state: _step_if(region, flat, *state), first, region.steps)
        found = region.target(point, free)
        return xp.where(xp.logical_and(convex, xp.logical_not(changes)), found, xp.zeros_like(found) + float("nan"))
    size = int(region.slope.shape[0])
    check_values(
        convex, f"a constrained minimum along {size} directions is found only where the loss is convex along them."
    )
    point, free = region.start()
    for _ in range(50 * size):
        point, free, changes = _step(region, flat, point, free)
        if not bool(changes):
            return region.target(point, free)
    raise BecameError(
        f"the constrained minimum along {size} directions was not found, for rounding; double precision may help."
    )


def _step_if(region: _Region, flat: Array, point: Array, free: Array, changes: Array) -> tuple[Array, Array, Array]:
    """Take a step, if the last one led to another face."""
    xp = namespace(point=point)
    onwards, among, again = _step(region, flat, point, free)
    return xp.where(changes, onwards, point), xp.where(changes, among, free), xp.logical_and(changes, again)


def _step(region: _Region, flat: Array, point: Array, free: Array) -> tuple[Array, Array, Array]:
    """Return the next point, what is free there, and whether that is another face: if not, it is the minimiser.

    A pull is one if it is greater than ``flat``, 0-d.
    """
    xp = namespace(point=point)
    rounding = rounding_of(point)
    none = xp.zeros_like(point)
    step = free * (region.target(point, free) - point)
    moves = xp.abs(step) > rounding
    room = xp.where(step > 0, region.highest - point, point) / xp.where(moves, xp.abs(step), none + 1)
    room = xp.where(moves, room, none + 2)  # more than a step needs
    is_blocked = xp.min(room) < 1 - rounding
    blocking = xp.where(is_blocked, first_least(room), none)
    point = point + xp.clip(xp.min(room), 0.0, 1.0) * step
    point = xp.where(blocking > 0, xp.astype(step > 0, point.dtype), point)
    pull = xp.where(free > 0, none - 1, region.pull(point, free))  # what is free is not to be let go
    # Not while there is a bound to settle, nor where the pull is rounding, nor where it is not a number.
    is_pulled = xp.logical_not(xp.logical_or(is_blocked, xp.max(pull) <= flat))
    released = xp.where(is_pulled, first_least(-pull), none)
    return point, free - blocking + released, xp.logical_or(is_blocked, is_pulled)
