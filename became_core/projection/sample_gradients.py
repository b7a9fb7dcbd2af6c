"""Gradients of single samples by one parameter: stacked, or as products where a layer has one position.

A sample whose layer y = W a has one position has the gradient g a^T by W, with g the gradient by y. Its factors are
d_out + d_in numbers, where the gradient has d_out d_in: for the first fully connected layer of an AlexNet-like network,
3 thousand and 2 million. All that OGD asks of gradients can be computed from the factors:

    <g a^T, h b^T> = (g.h) (a.b),    <g a^T, U> = g.U a,    sum_i c_i g_i a_i^T = (c * G)^T A.

Convention: n gradients by one parameter are an array [n, *shape], or the rows of G [n, d_out] and A [n, d_in]. Inner
products of gradients are summed in float64, and those with an update in the dtype of the gradients, at least float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from became_core.arrays import Array, namespace, pytree, reduction_dtype
from became_core.projection.subspace import wide

__all__ = ["Products", "SampleGradients", "Stacked"]

# How many columns are converted to float64 at once, so that no float64 copy of a whole array exists.
SLAB = 2**13


class SampleGradients(Protocol):
    """The gradients of n samples by one parameter."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What is stored, the samples first."""

    @property
    def size(self) -> int:
        """The number of entries of one gradient."""

    def __getitem__(self, samples: slice) -> Self:
        """Return the gradients of some of the samples."""

    def take(self, samples: Array) -> Self:
        """Return the gradients of the samples with these numbers, in their order."""

    def joined(self, others: Sequence[Self]) -> Self:
        """Return these gradients and others after them."""

    def inner(self) -> Array:
        """Return the inner products of all pairs, [n, n], in float64."""

    def along(self, update: Array) -> Array:
        """Return the inner products with an update of the parameter's shape, [n]."""

    def combined(self, coefficients: Array, update: Array) -> Array:
        """Return the sum of the gradients times coefficients [n], in the shape and dtype of an update."""


class _Stored:
    """Gradients that are stored as arrays whose first axis is that of the samples."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays, in the order of the fields."""
        raise NotImplementedError

    def __getitem__(self, samples: slice) -> Self:
        """Return the gradients of some of the samples."""
        return type(self)(*(array[samples, ...] for array in self.arrays))

    def take(self, samples: Array) -> Self:
        """Return the gradients of the samples with these numbers."""
        return type(self)(*(namespace(array=array).take(array, samples, axis=0) for array in self.arrays))

    def joined(self, others: Sequence[Self]) -> Self:
        """Return these gradients and others after them."""
        sides = zip(self.arrays, *(other.arrays for other in others), strict=True)
        return type(self)(*(namespace(array=side[0]).concat(list(side), axis=0) for side in sides))


@pytree
@dataclass(frozen=True)
class Stacked(_Stored):
    """Gradients as they are.

    Attributes:
        values: [n, *shape of the parameter].
    """

    values: Array

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The values."""
        return (self.values,)

    @property
    def size(self) -> int:
        """The number of entries of one gradient."""
        return math.prod(self.values.shape[1:])

    def inner(self) -> Array:
        """Return the inner products of all pairs, piece by piece."""
        return _inner(self._flat())

    def along(self, update: Array) -> Array:
        """Return the inner products with an update."""
        xp: Any = namespace(values=self.values, update=update)
        rows = self._flat()
        return xp.matmul(rows, xp.reshape(xp.astype(update, rows.dtype, copy=False), (-1,)))

    def combined(self, coefficients: Array, update: Array) -> Array:
        """Return the sum of the gradients times coefficients."""
        xp: Any = namespace(values=self.values, update=update)
        rows = self._flat()
        return _like(update, xp.matmul(xp.astype(coefficients, rows.dtype, copy=False), rows))

    def _flat(self) -> Array:
        xp: Any = namespace(values=self.values)
        dtype = reduction_dtype(xp, values=self.values)
        return xp.reshape(xp.astype(self.values, dtype, copy=False), (self.values.shape[0], self.size))


@pytree
@dataclass(frozen=True)
class Products(_Stored):
    """Gradients g a^T of a matrix.

    Attributes:
        left: the rows g, [n, d_out].
        right: the rows a, [n, d_in].

    Examples:
        >>> import numpy as np
        >>> products = Products(np.array([[1.0, 2.0]]), np.array([[3.0, 0.0, 1.0]]))
        >>> products.stacked((2, 3)).values
        array([[[3., 0., 1.],
                [6., 0., 2.]]])
        >>> products.along(np.ones((2, 3)))
        array([12.])
    """

    left: Array
    right: Array

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The factors."""
        return self.left, self.right

    @property
    def size(self) -> int:
        """The number of entries of one gradient."""
        return int(self.left.shape[1]) * int(self.right.shape[1])

    def inner(self) -> Array:
        """Return the inner products of all pairs, (G G^T) * (A A^T)."""
        return _inner(self.left) * _inner(self.right)

    def along(self, update: Array) -> Array:
        """Return the inner products with an update."""
        xp: Any = namespace(left=self.left, update=update)
        matrix = xp.reshape(xp.astype(update, self.left.dtype, copy=False), (self.left.shape[1], self.right.shape[1]))
        return xp.sum(xp.matmul(self.left, matrix) * self.right, axis=1)

    def combined(self, coefficients: Array, update: Array) -> Array:
        """Return the sum of the gradients times coefficients, one product of two matrices."""
        xp: Any = namespace(left=self.left, update=update)
        weighed = self.left * xp.astype(coefficients, self.left.dtype, copy=False)[:, None]
        return _like(update, xp.matmul(xp.matrix_transpose(weighed), self.right))

    def stacked(self, shape: Sequence[int]) -> Stacked:
        """Return the gradients as they are, for a parameter of this shape."""
        xp: Any = namespace(left=self.left)
        return Stacked(xp.reshape(self.left[:, :, None] * self.right[:, None, :], (self.left.shape[0], *shape)))


def _inner(rows: Array) -> Array:
    """Return the inner products of all pairs of rows [n, p], in float64."""
    xp: Any = namespace(rows=rows)
    total: Any = 0.0
    for start in range(0, rows.shape[1], SLAB):
        piece = wide(rows[:, start : min(start + SLAB, rows.shape[1])])
        total = xp.matmul(piece, xp.matrix_transpose(piece)) + total
    return total


def _like(update: Array, values: Array) -> Array:
    xp: Any = namespace(update=update)
    return xp.reshape(xp.astype(values, update.dtype, copy=False), update.shape)
