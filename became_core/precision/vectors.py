"""What the structures of precisions share: parameters as flat vectors, K of them as rows, numbers to scale by.

Convention: an array is flattened row by row (the last axis fastest).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import Any

from became_core.arrays import (
    Array,
    Params,
    check_values,
    device,
    hold,
    namespace,
    reduction_dtype,
    row_products,
    shared_by_processes,
)
from became_core.errors import BecameError

__all__ = [
    "Rows",
    "Shape",
    "Shapes",
    "added",
    "amount_in",
    "check_amount",
    "check_diagonal",
    "check_diagonals",
    "check_positive",
    "check_symmetric",
    "diagonal_gram",
    "diagonal_matrix",
    "embedded",
    "flat",
    "identity",
    "inner_products",
    "parted",
    "size",
    "whole",
    "wide",
]

Shape = tuple[int, ...]


class Shapes(dict[str, Shape]):
    """Parameters' shapes by name; hashable, as whatever is not an array must be for a trace to tell it by."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        super().__init__((name, tuple(shape)) for name, shape in shapes.items())

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> "Shapes":
        """Return these shapes, the very object if it is one already: torch.compile cannot return one made anew."""
        return shapes if isinstance(shapes, cls) else cls(shapes)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


@dataclass(frozen=True)
class Rows:
    """K directions, read parameter by parameter, so that no copy is larger than K times one parameter.

    Attributes:
        directions: the directions.
        xp: their namespace.
        dtype: of the computation.
        flattens: whether parameters are read as vectors. Those that a compiler may spread over several devices keep
            their shapes.
    """

    directions: Sequence[Params]
    xp: Any
    dtype: Any
    flattens: bool = True

    def of(self, name: str) -> Array:
        """Return one parameter of each direction, [K, size], or [K, *shape] if it keeps its shape."""
        return self.xp.stack([self.like(direction[name]) for direction in self.directions], axis=0)

    def like(self, array: Array) -> Array:
        """Return an array of a parameter's shape as its rows are."""
        return flat(self.xp, array, self.dtype) if self.flattens else wide(self.xp, array, self.dtype)


def inner_products(xp: Any, left: Array, right: Array) -> Array:
    """Return the inner products of K and of K' arrays, [K, ...] and [K', ...] to [K, K'].

    Arrays keep their shapes, so that each device can sum what it has of them.
    """
    if left.ndim == 1:  # of a parameter without axes
        return xp.expand_dims(left, axis=-1) * xp.expand_dims(right, axis=0)
    if left.ndim == 2:
        return row_products(left, right)
    axes = tuple(range(1, left.ndim))
    return xp.tensordot(left, right, axes=(axes, axes))


def diagonal_gram(values: Params, left: Rows, right: Rows) -> Array:
    """Return the Gram matrix of directions by a diagonal, [K, K'], given its values by parameter."""
    total = None
    for name, value in values.items():
        part = inner_products(left.xp, left.of(name) * left.like(value), right.of(name))
        total = part if total is None else total + part
    return total


def wide(xp: Any, array: Array, dtype: Any) -> Array:
    """Return an array in the dtype of the computation."""
    return xp.astype(array, dtype, copy=False)


def whole(label: str, array: Array) -> Array:
    """Return an array that every process must have whole, as this process has it.

    Raises:
        BecameError: if processes share it.
    """
    shared = shared_by_processes([array])
    if shared is None:
        return array
    part = shared.layout([array]).part(array)
    if tuple(part.shape) != tuple(array.shape):
        raise BecameError(f"{label} is shared by processes, each of which needs it whole; replicate it.")
    return part


def flat(xp: Any, array: Array, dtype: Any) -> Array:
    """Return an array as a vector in the dtype of the computation, [size]."""
    return wide(xp, xp.reshape(array, (-1,)), dtype)


def size(shape: Shape) -> int:
    """Return how many entries an array of this shape has."""
    return math.prod(shape)


def identity(xp: Any, like: Array) -> Array:
    """Return the identity with as many rows as an array has, of its dtype and device."""
    return xp.eye(like.shape[0], dtype=like.dtype, device=device(like))


def diagonal_matrix(xp: Any, values: Array) -> Array:
    """Return the matrix with these values on its diagonal, [d, d]."""
    return identity(xp, values) * values


def embedded(xp: Any, matrix: Array, own: Mapping[str, Shape], total: Mapping[str, Shape]) -> Array:
    """Return a matrix over parameters as one over others, sorted by name as it is; zero for those that it lacks."""
    starts = dict(zip(sorted(own), accumulate((size(own[name]) for name in sorted(own)), initial=0), strict=False))
    nothing = matrix.shape[0]  # the index of the row and column of zeros that are put behind the others
    places = [starts[name] + k if name in own else nothing for name in sorted(total) for k in range(size(total[name]))]
    padded = xp.concat([matrix, xp.zeros_like(matrix[:1, :])], axis=0)
    padded = xp.concat([padded, xp.zeros_like(padded[:, :1])], axis=1)
    index = xp.asarray(places, dtype=xp.int64, device=device(matrix))
    return xp.take(xp.take(padded, index, axis=0), index, axis=1)


def added(left: Params, right: Params) -> Params:
    """Return the sum, name by name; a parameter that only one of the two has keeps its value."""
    total = dict(left)
    for name, value in right.items():
        total[name] = _sum(total[name], value) if name in total else value
    return total


def parted(tree: Mapping[str, Any], names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what belongs to these parameters, and the rest."""
    inside = {name: value for name, value in tree.items() if name in names}
    return inside, {name: value for name, value in tree.items() if name not in names}


def _sum(left: Array, right: Array) -> Array:
    xp = namespace(left=left, right=right)
    dtype = xp.result_type(left.dtype, right.dtype)
    return wide(xp, left, dtype) + wide(xp, right, dtype)


def check_amount(amount: Array | float, label: str) -> None:
    """Raise a BecameError unless a number, or a 0-d array, is at least 0."""
    if isinstance(amount, Real):
        if not float(amount) >= 0:
            raise BecameError(f"{label} is {amount}; it must be at least 0.")
        return
    namespace(**{label: amount})
    check_values(amount >= 0, f"{label} is negative or not a number; it must be at least 0.")


def amount_in(amount: Array | float, like: Array) -> Any:
    """Return a number, or a 0-d array, so that an array times it, or plus it, keeps its dtype."""
    if isinstance(amount, Real):
        return float(amount)
    return wide(namespace(amount=amount, array=like), amount, like.dtype)


def check_diagonal(label: str, values: Array) -> None:
    """Raise a BecameError that names the array if an entry is negative or not a number."""
    check_diagonals({label: values})


def check_diagonals(diagonals: Mapping[str, Array]) -> None:
    """Raise a BecameError that names the first array, by label, with an entry that is negative or not a number.

    Arrays that processes share are checked with one reduction for all of them.
    """
    message = "{} has negative or NaN entries; a curvature's diagonal must be at least 0."
    if shared_by_processes(list(diagonals.values())) is None:
        for label, values in diagonals.items():
            # `not (x >= 0)` rather than `x < 0`: the comparison is false for a NaN too.
            check_values(namespace(values=values).all(values >= 0), message.format(label))
        return
    sound = hold(lambda xp, values: values >= 0, list(diagonals.values()))
    for label, is_sound in zip(diagonals, sound, strict=True):
        if not is_sound:
            raise BecameError(message.format(label))


def check_positive(label: str, values: Array) -> None:
    """Raise a BecameError that names the diagonal if an entry is not positive, so that it has no inverse."""
    check_values(
        namespace(values=values).all(values > 0),
        f"{label} has zero entries and so no inverse; add a multiple of the identity with `damped`.",
    )


def check_symmetric(matrix: Array, label: str) -> None:
    """Raise a BecameError unless an array is a symmetric matrix without negative or NaN entries on its diagonal."""
    xp = namespace(**{label: matrix})
    reduction_dtype(xp, **{label: matrix})
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise BecameError(f"{label} has shape {tuple(matrix.shape)}; it must be a square matrix.")
    check_values(
        xp.all(xp.linalg.diagonal(matrix) >= 0),
        f"{label} has negative or NaN entries on its diagonal; a curvature's diagonal must be at least 0.",
    )
    # Rounding in the sums that the matrix was made of is to be forgiven; half a matrix is not.
    tolerance = xp.finfo(matrix.dtype).eps ** 0.5 * xp.max(xp.abs(matrix))
    check_values(
        xp.all(xp.abs(matrix - xp.matrix_transpose(matrix)) <= tolerance), f"{label} is not symmetric; a curvature is."
    )
