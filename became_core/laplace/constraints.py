"""Minimisers of a small quadratic b.a + 1/2 a.C.a: free, in the box [0, 1]^K, on the simplex (a >= 0, sum a = 1).

Both constrained problems are solved exactly, by faces. On a face some coefficients are held at a bound and the others
satisfy a linear system; a minimiser is that point of some face which meets the optimality (KKT) conditions. For few
directions all faces are looked at at once, in one batch of linear systems: no branch depends on a value, so this runs
under any trace, differentiates, and finds the global minimum of a quadratic that is not convex, too. For more,
``active_set`` walks from face to face.

Convention: slope [K], curvature [K, K], result [K].
"""

from itertools import product

from became_core.arrays import Array, namespace
from became_core.laplace.active_set import Box, Simplex, walk
from became_core.laplace.faces import (
    box_face,
    check_finite,
    constant,
    first_least,
    is_positive,
    ridged,
    rounding_of,
    simplex_face,
    solve,
)

__all__ = ["free_minimiser", "minimise_in_box", "minimise_on_simplex", "segment_minimiser"]

# So many directions are solved by looking at all faces: 3^5 of the box, 2^9 of the simplex.
_BOX_BY_FACES, _SIMPLEX_BY_FACES = 5, 9
_FREE = -1.0  # where a face, a tuple of bounds, has none


def segment_minimiser(slope: Array, curvature: Array, *, clip: bool) -> Array:
    """Return the minimiser of ``slope * a + curvature * a^2 / 2``, element by element.

    Args:
        slope: of any shape.
        curvature: of the same shape.
        clip: minimise over [0, 1]: a concave or linear quadratic has its minimum at an end, and a constant one gives 0.
            Without it, the stationary point, and 0 where there is no curvature.
    """
    xp = namespace(slope=slope, curvature=curvature)
    # What is below the smallest normal number is rounding, and some processors flush it: zero on all of them.
    tiny = xp.finfo(slope.dtype).smallest_normal
    zero, one = xp.zeros_like(slope), xp.ones_like(slope)
    slope = xp.where(xp.abs(slope) < tiny, zero, slope)
    curvature = xp.where(xp.abs(curvature) < tiny, zero, curvature)
    # `not (c <= 0)` rather than `c > 0`: what is not a number must not pass for "no curvature".
    curved = xp.logical_not(curvature <= 0) if clip else curvature != 0
    # The inner `where` keeps the branch not taken finite: its infinite gradient would poison the one that is.
    stationary = -slope / xp.where(curved, curvature, one)
    if not clip:
        return xp.where(curved, stationary, zero)
    better_end = xp.where(slope + 0.5 * curvature < 0, one, zero)
    return xp.where(curved, xp.clip(stationary, 0.0, 1.0), better_end)


def free_minimiser(slope: Array, curvature: Array) -> Array:
    """Return the stationary point -C^-1 b, [K]; 0 for a direction without curvature.

    Raises:
        BecameError: if there are several directions and something is not finite.
    """
    xp = namespace(slope=slope, curvature=curvature)
    if slope.shape[0] == 1:
        return segment_minimiser(slope, curvature[:, 0], clip=False)
    check_finite(slope, curvature)
    curved = xp.max(xp.abs(curvature), axis=1) > 0
    return xp.where(curved, solve(ridged(curvature), -slope), xp.zeros_like(slope))


def minimise_in_box(slope: Array, curvature: Array) -> Array:
    """Return the minimiser over 0 <= a <= 1, [K].

    Raises:
        BecameError: if there are several directions and something is not finite, or more than 5 and the loss is
            not convex along them; under a trace the result is NaN.
    """
    xp = namespace(slope=slope, curvature=curvature)
    size = int(slope.shape[0])
    if size == 1:
        return segment_minimiser(slope, curvature[:, 0], clip=True)
    check_finite(slope, curvature)
    if size > _BOX_BY_FACES:
        return xp.clip(walk(Box(slope, curvature)), 0.0, 1.0)
    faces = sorted(product((0.0, 1.0, _FREE), repeat=size), key=_freedom)
    free = constant([[float(bound == _FREE) for bound in face] for face in faces], slope)
    held = constant([[0.0 if bound == _FREE else bound for bound in face] for face in faces], slope)
    points = box_face(slope, curvature, free, held)
    gradient = slope + xp.matmul(points, curvature)
    # Where a coefficient is free the gradient vanishes; at 0 it may point up, at 1 down.
    wrong = free * xp.abs(gradient) + (1 - free) * _positive(held * gradient - (1 - held) * gradient)
    outside = _positive(-points) + _positive(points - 1)
    return xp.clip(_best(slope, curvature, points, wrong, outside), 0.0, 1.0)


def minimise_on_simplex(slope: Array, curvature: Array) -> Array:
    """Return the minimiser over a >= 0 with sum 1, [K].

    Raises:
        BecameError: if something is not finite, or if there are more than 9 directions and the loss is not convex on
            the simplex; under a trace the result is NaN.
    """
    xp = namespace(slope=slope, curvature=curvature)
    size = int(slope.shape[0])
    check_finite(slope, curvature)
    slope = slope - xp.min(slope)  # a constant added to all slopes changes nothing, but would cost digits
    if size > _SIMPLEX_BY_FACES:
        best = _positive(walk(Simplex(slope, curvature)))
        return best / xp.sum(best)
    faces = sorted(product((_FREE, 0.0), repeat=size), key=_freedom)[1:]  # all but the one with nothing free
    free = constant([[float(bound == _FREE) for bound in face] for face in faces], slope)
    first = constant([[float(index == face.index(_FREE)) for index in range(size)] for face in faces], slope)
    points = simplex_face(slope, curvature, free)
    gradient = slope + xp.matmul(points, curvature)
    level = xp.sum(first * gradient, axis=1, keepdims=True)  # the free coefficients' common gradient
    wrong = free * xp.abs(gradient - level) + (1 - free) * _positive(level - gradient)
    best = _positive(_best(slope, curvature, points, wrong, _positive(-points)))
    return best / xp.sum(best)


def _freedom(face: tuple[float, ...]) -> tuple[int, tuple[float, ...]]:
    """Order faces by how many coefficients are free, so that the first of several best points is a simple one."""
    return face.count(_FREE), face


def _positive(values: Array) -> Array:
    xp = namespace(values=values)
    return xp.where(values > 0, values, xp.zeros_like(values))


def _best(slope: Array, curvature: Array, points: Array, wrong: Array, outside: Array) -> Array:
    """Return a point [K] that meets the optimality conditions or, if C is indefinite, the lowest feasible one.

    Not the lowest one in any case: near a minimum values differ by less than their rounding, and conditions do not. Of
    those that meet them up to rounding it is the first: where there are many minima, one that is simple.
    """
    xp = namespace(slope=slope, curvature=curvature)
    slack = rounding_of(slope)
    scale = xp.max(xp.abs(curvature)) + xp.max(xp.abs(slope))
    violation = xp.max(outside, axis=1) + xp.max(wrong, axis=1) / xp.where(scale > 0, scale, xp.ones_like(scale))
    convex = is_positive(curvature, slack)
    height = xp.sum(points * (slope + 0.5 * xp.matmul(points, curvature)), axis=1)
    never = xp.zeros_like(height) + float("inf")
    height = xp.where(xp.max(outside, axis=1) <= slack, height, never)
    score = xp.where(convex, violation, height)
    score = xp.where(xp.isfinite(score), score, never)
    best = score <= xp.min(score) + xp.where(convex, slack, xp.zeros_like(scale))
    chosen = first_least(xp.where(best, xp.zeros_like(score), xp.ones_like(score))) > 0
    # `where` rather than a product, which would let a point that is not finite through.
    return xp.sum(xp.where(xp.expand_dims(chosen, axis=-1), points, xp.zeros_like(points)), axis=0)
