"""Faces of the box [0, 1]^K and of the simplex: where on each a quadratic b.a + 1/2 a.C.a is stationary.

And what must hold of one that is to be minimised there: it is finite, and convex or not.

Convention: a face is a row of ``free`` [faces, K], 1 where a coefficient is solved for and 0 where it stays put. The
systems carry a ridge of the size of the curvature's rounding, so that directions which coincide share their weight
evenly rather than fail.
"""

from collections.abc import Sequence
from typing import Any

from became_core.arrays import Array, check_values, device, namespace

__all__ = [
    "box_face",
    "check_finite",
    "constant",
    "first_least",
    "is_positive",
    "ridged",
    "rounding_of",
    "simplex_face",
    "solve",
]


def constant(values: Sequence[Any], like: Array) -> Array:
    """Return numbers that are known beforehand, nested sequences of them, as an array like another."""
    xp = namespace(like=like)
    return xp.asarray(values, dtype=like.dtype, device=device(like))


def check_finite(slope: Array, curvature: Array) -> None:
    """Raise a BecameError where values can be looked at and one is NaN or infinite, which no solver takes."""
    xp = namespace(slope=slope, curvature=curvature)
    finite = xp.logical_and(xp.all(xp.isfinite(slope)), xp.all(xp.isfinite(curvature)))
    check_values(finite, f"a quadratic of {slope.shape[0]} directions has NaN or infinite entries; all must be finite.")


def is_positive(curvature: Array, slack: float) -> Array:
    """Whether a curvature [K, K] is positive semi-definite, up to this share of its largest eigenvalue, 0-d."""
    xp = namespace(curvature=curvature)
    eigenvalues = xp.linalg.eigvalsh(curvature)
    return xp.min(eigenvalues) >= -slack * xp.max(xp.abs(eigenvalues))


def rounding_of(slope: Array) -> float:
    """Return what share of the largest number of a quadratic with this slope [K] is taken for rounding."""
    return float(16 * slope.shape[0] * namespace(slope=slope).finfo(slope.dtype).eps)


def first_least(values: Array) -> Array:
    """Return a mask of the least value, the first of several, [n] of zeros and a one."""
    xp = namespace(values=values)
    place = xp.arange(values.shape[0], dtype=values.dtype, device=device(values))
    return xp.astype(place == xp.astype(xp.argmin(values), values.dtype), values.dtype)


def box_face(slope: Array, curvature: Array, free: Array, held: Array) -> Array:
    """Return each face's stationary point, [faces, K]: free coefficients solved for, the others as in ``held``."""
    xp = namespace(slope=slope, curvature=curvature, free=free, held=held)
    right = held - free * (slope + xp.matmul(held, curvature))
    return solve(_among_free(curvature, free), right)


def simplex_face(slope: Array, curvature: Array, free: Array) -> Array:
    """Return each face's stationary point with sum 1, [faces, K]."""
    xp = namespace(slope=slope, curvature=curvature, free=free)
    # A constant added to all curvatures changes nothing on the simplex; with one, systems are singular only where the
    # face has many minima.
    systems = _among_free(curvature + xp.max(xp.abs(curvature)), free)
    by_slope, by_one = solve(systems, free * slope), solve(systems, free)
    total = xp.sum(by_one, axis=-1, keepdims=True)
    return (1 + xp.sum(by_slope, axis=-1, keepdims=True)) / total * by_one - by_slope


def solve(matrices: Array, right: Array) -> Array:
    """Return the solutions [..., K] of matrices [..., K, K]."""
    xp = namespace(matrices=matrices, right=right)
    return xp.linalg.solve(matrices, xp.expand_dims(right, axis=-1))[..., 0]


def ridged(curvature: Array) -> Array:
    """Return a curvature [K, K] with a ridge of the size of its rounding; the identity, if it is zero."""
    xp = namespace(curvature=curvature)
    size = curvature.shape[0]
    largest = xp.max(xp.abs(curvature))
    ridge = xp.where(largest > 0, 2 * size * xp.finfo(curvature.dtype).eps * largest, xp.ones_like(largest))
    return curvature + ridge * xp.eye(size, dtype=curvature.dtype, device=device(curvature))


def _among_free(curvature: Array, free: Array) -> Array:
    """For each face the curvature among its free coefficients, and the identity for the others, [faces, K, K]."""
    xp = namespace(curvature=curvature, free=free)
    both = xp.expand_dims(free, axis=-1) * xp.expand_dims(free, axis=-2)
    identity = xp.eye(curvature.shape[0], dtype=curvature.dtype, device=device(curvature))
    return ridged(curvature) * both + identity * (1 - both)
