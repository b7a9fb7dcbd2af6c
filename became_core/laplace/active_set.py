"""The active-set method for the box and the simplex (Nocedal & Wright, Numerical Optimization, Algorithm 16.3).

From a corner, always downhill: to the stationary point of the present face, or as far as a bound lets; there, one more
coefficient is held. Where a face's own minimum is reached, the coefficient whose bound costs most is let go. Finite,
and exact, for a convex quadratic. It looks at values, so it cannot be traced; ``constraints`` has what can.

Convention: slope [K], curvature [K, K], points [K].
"""

from typing import Protocol

from became_core.arrays import Array, namespace
from became_core.errors import BecameError
from became_core.laplace.faces import box_face, constant, simplex_face

__all__ = ["Box", "Simplex", "walk"]


class _Region(Protocol):
    """A feasible region, and a quadratic to minimise in it."""

    slope: Array
    curvature: Array
    highest: float

    def start(self) -> int | None:
        """Return the coefficient that begins at 1 and free; all others begin at 0, held."""

    def target(self, point: Array, free: Array) -> Array:
        """Return the stationary point of the face with these free coefficients."""

    def pull(self, point: Array, free: Array) -> Array:
        """Return how strongly the loss pulls each held coefficient off its bound, into the region."""


class Box:
    """0 <= a <= 1."""

    highest = 1.0

    def __init__(self, slope: Array, curvature: Array) -> None:
        """Keep the quadratic."""
        self.slope, self.curvature = slope, curvature

    def start(self) -> int | None:
        """Begin at 0."""
        return None

    def target(self, point: Array, free: Array) -> Array:
        """Solve for the free coefficients, the others held where they are."""
        return box_face(self.slope, self.curvature, free[None, :], ((1 - free) * point)[None, :])[0, :]

    def pull(self, point: Array, free: Array) -> Array:
        """Upwards at 0, downwards at 1."""
        xp = namespace(point=point)
        gradient = self.slope + xp.matmul(self.curvature, point)
        return xp.where(point > 0.5, gradient, -gradient)


class Simplex:
    """a >= 0 with sum 1."""

    highest = float("inf")

    def __init__(self, slope: Array, curvature: Array) -> None:
        """Keep the quadratic."""
        self.slope, self.curvature = slope, curvature

    def start(self) -> int | None:
        """Begin at the best corner."""
        xp = namespace(slope=self.slope)
        return int(xp.argmin(self.slope + 0.5 * xp.linalg.diagonal(self.curvature)))

    def target(self, point: Array, free: Array) -> Array:
        """Solve for the free coefficients, whose sum is 1; the others are 0."""
        return simplex_face(self.slope, self.curvature, free[None, :])[0, :]

    def pull(self, point: Array, free: Array) -> Array:
        """Where the gradient is lower than that of the free coefficients, which is one and the same."""
        xp = namespace(point=point)
        gradient = self.slope + xp.matmul(self.curvature, point)
        return xp.sum(self._first(free) * gradient) - gradient

    def _first(self, free: Array) -> Array:
        xp = namespace(free=free)
        return constant(_marked(int(free.shape[0]), int(xp.argmax(free))), free)


def walk(region: _Region) -> Array:
    """Return the minimiser in a region, [K].

    Raises:
        BecameError: if it is not found, as may happen where the curvature is not positive semi-definite.
    """
    slope, curvature = region.slope, region.curvature
    xp = namespace(slope=slope, curvature=curvature)
    size = int(slope.shape[0])
    rounding = 16 * size * float(xp.finfo(slope.dtype).eps)
    flat = rounding * float(xp.max(xp.abs(curvature)) + xp.max(xp.abs(slope)))
    is_free = _marked(size, region.start())
    point = constant(is_free, slope)
    for _ in range(50 * size):
        free = constant(is_free, slope)
        step = free * (region.target(point, free) - point)
        length, blocking = _room(point, step, region.highest, rounding)
        point = point + length * step
        if blocking is not None:
            is_free[blocking] = 0.0
            held = constant(_marked(size, blocking), slope)
            bound = region.highest if float(step[blocking]) > 0 else 0.0
            point = point * (1 - held) + held * bound
            continue
        pull = region.pull(point, free) * (1 - free) - free  # what is free is not to be let go
        strongest = int(xp.argmax(pull))
        if float(pull[strongest]) <= flat:
            return point
        is_free[strongest] = 1.0
    raise BecameError("the constrained minimum was not found; the curvature must be positive semi-definite.")


def _marked(size: int, index: int | None) -> list[float]:
    """Return zeros with a 1 at an index, if there is one."""
    return [float(position == index) for position in range(size)]


def _room(point: Array, step: Array, highest: float, rounding: float) -> tuple[float, int | None]:
    """Return how far the step can go, at most 1, and which coefficient stops it."""
    length, blocking = 1.0, None
    for index in range(int(point.shape[0])):
        here, move = float(point[index]), float(step[index])
        if abs(move) > rounding:
            room = ((highest if move > 0 else 0.0) - here) / move
            if room < length * (1 - rounding):
                length, blocking = max(room, 0.0), index
    return length, blocking
