"""The dense precision, a matrix over all its parameters: exact, for small models, and what others are tested against.

Convention: rows and columns are the parameters sorted by name, each flattened row by row.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from became_core.arrays import Array, Params, check_values, namespace, pytree, static
from became_core.errors import BecameError
from became_core.precision.base import Precision
from became_core.precision.vectors import (
    Rows,
    Shape,
    Shapes,
    amount_in,
    check_amount,
    check_symmetric,
    embedded,
    identity,
    inner_products,
    size,
    whole,
    wide,
)

__all__ = ["Dense"]


@pytree
@dataclass(frozen=True)
class Dense(Precision):
    """A precision without structure.

    Attributes:
        matrix: [d, d], symmetric positive semi-definite.
        shapes: the parameters' shapes by name; the matrix has them sorted by name, in whatever order they are given.

    Raises:
        BecameError: if the matrix is not square and symmetric, has negative or NaN entries on its diagonal, or is not
            of the size that the shapes make together.

    Example:
        >>> import numpy as np
        >>> precision = Dense(np.asarray([[2.0, 1.0], [1.0, 3.0]]), {"w": (2,)})
        >>> precision.apply({"w": np.asarray([1.0, 0.0])})["w"].tolist()
        [2.0, 1.0]
    """

    couples: ClassVar[bool] = True

    matrix: Array
    shapes: Mapping[str, Shape] = static()

    def __post_init__(self) -> None:
        """Check the matrix."""
        object.__setattr__(self, "shapes", Shapes.of(self.shapes))
        check_symmetric(self.matrix, "the precision matrix")
        total = sum(size(shape) for shape in self.shapes.values())
        if self.matrix.shape[0] != total:
            raise BecameError(
                f"the precision matrix has shape {tuple(self.matrix.shape)} but its parameters have {total} entries; "
                "make them equal."
            )

    @classmethod
    def of(cls, precision: Precision) -> "Dense":
        """Return a precision of any structure as a matrix over all parameters that it covers: exact, d x d numbers."""
        xp, dtype = precision._common([], ())
        return cls(precision._matrix(xp, dtype), dict(sorted(precision.covered().items())))

    def covered(self) -> dict[str, Shape]:
        """Return the shapes of the parameters, sorted by name."""
        return {name: self.shapes[name] for name in sorted(self.shapes)}

    def diagonal(self) -> Params:
        """Return the matrix's diagonal."""
        xp, _ = self._common([], ())
        return self._shaped(xp, xp.linalg.diagonal(self.matrix))

    def inverse_diagonal(self) -> Params:
        """Return the diagonal of the inverse matrix."""
        xp, dtype = self._common([], ())
        matrix = self._positive(xp, dtype)
        # P^-1 = L^-T L^-1, so that its diagonal is a sum of squares, positive whatever the rounding.
        root = xp.linalg.solve(xp.linalg.cholesky(matrix), identity(xp, matrix))
        return self._shaped(xp, xp.sum(root * root, axis=0))

    def log_determinant(self) -> Array:
        """Return log det P, by Cholesky."""
        xp, dtype = self._common([], ())
        return 2.0 * xp.sum(xp.log(xp.linalg.diagonal(xp.linalg.cholesky(self._positive(xp, dtype)))))

    def damped(self, amount: Array | float) -> "Dense":
        """Return the matrix + amount * identity."""
        check_amount(amount, "the damping")
        xp, _ = self._common([], ())
        return Dense(self.matrix + identity(xp, self.matrix) * amount_in(amount, self.matrix), self.shapes)

    def __mul__(self, factor: Array | float) -> "Dense":
        """Return the matrix times a number that is at least 0."""
        check_amount(factor, "a precision's factor")
        return Dense(self.matrix * amount_in(factor, self.matrix), self.shapes)

    def _arrays(self) -> dict[str, Array]:
        return {"the precision matrix": self.matrix}

    def _gram(self, left: Rows, right: Rows) -> Array:
        xp = left.xp
        if not left.flattens:
            return self._gram_by_blocks(left, right)
        u, v = (xp.concat([rows.of(name) for name in self.covered()], axis=1) for rows in (left, right))
        return xp.matmul(xp.matmul(u, wide(xp, self.matrix, left.dtype)), xp.matrix_transpose(v))

    def _gram_by_blocks(self, left: Rows, right: Rows) -> Array:
        """As ``_gram``, for parameters that keep their shapes: block by block of the matrix."""
        xp, shapes = left.xp, self.covered()
        starts = dict(zip(shapes, accumulate(map(size, shapes.values()), initial=0), strict=False))
        total = None
        for row, u_shape in shapes.items():
            u, axes = left.of(row), tuple(range(len(u_shape)))
            for column, v_shape in shapes.items():
                across = slice(starts[row], starts[row] + size(u_shape))
                along = slice(starts[column], starts[column] + size(v_shape))
                block = xp.reshape(wide(xp, self.matrix, left.dtype)[across, along], (*u_shape, *v_shape))
                times = xp.tensordot(u, block, axes=(tuple(axis + 1 for axis in axes), axes))
                part = inner_products(xp, times, right.of(column))
                total = part if total is None else total + part
        return total

    def _here(self, layouts: Mapping[str, Any]) -> "Dense":
        return Dense(whole("the precision matrix", self.matrix), self.shapes)

    def _times(self, vector: Params) -> Params:
        xp, joined = self._joined(vector)
        return self._parts(xp.matmul(wide(xp, self.matrix, joined.dtype), joined))

    def _solved(self, vector: Params) -> Params:
        xp, joined = self._joined(vector)
        return self._parts(xp.linalg.solve(self._positive(xp, joined.dtype), joined))

    def _coloured(self, noise: Params) -> Params:
        xp, joined = self._joined(noise)
        root = xp.linalg.cholesky(self._positive(xp, joined.dtype))
        return self._parts(xp.linalg.solve(xp.matrix_transpose(root), joined))

    def _matrix(self, xp: Any, dtype: Any) -> Array:
        return wide(xp, self.matrix, dtype)

    def _combined(self, other: Precision) -> Precision | None:
        own, its = self.covered(), other.covered()
        # A matrix absorbs whatever lies within it; another matrix may widen it.
        if not isinstance(other, Dense) and not its.keys() <= own.keys():
            return None
        total = dict(sorted({**its, **own}.items()))
        arrays = [self.matrix, *other._arrays().values()]
        xp = namespace(**{f"array {k} of the sum": array for k, array in enumerate(arrays)})
        dtype = xp.result_type(*(array.dtype for array in arrays))
        left, right = (embedded(xp, one._matrix(xp, dtype), one.covered(), total) for one in (self, other))
        return Dense(left + right, total)

    def _restricted(self, names: Collection[str]) -> "Dense":
        xp, _ = self._common([], ())
        own = self.covered()
        kept = {name: own[name] for name in own if name in names}
        return Dense(embedded(xp, self.matrix, own, kept), kept)

    def _joint(self) -> Iterable[str]:
        return self.shapes

    def _positive(self, xp: Any, dtype: Any) -> Array:
        """The matrix in a dtype; it must be positive definite, which frameworks check each in its own way or not."""
        matrix = wide(xp, self.matrix, dtype)
        spectrum = xp.linalg.eigvalsh(matrix)
        rounding = xp.finfo(dtype).eps * matrix.shape[0]
        check_values(
            xp.min(spectrum) > rounding * xp.max(spectrum),
            "the precision matrix is singular to rounding and has no inverse; add a multiple of the identity with "
            "`damped`.",
        )
        return matrix

    def _joined(self, vector: Params) -> tuple[Any, Array]:
        parts = [vector[name] for name in self.covered()]
        xp = namespace(part=parts[0])
        return xp, xp.concat(parts, axis=0)

    def _parts(self, joined: Array) -> Params:
        parts, start = {}, 0
        for name, shape in self.covered().items():
            parts[name] = joined[start : start + size(shape)]
            start += size(shape)
        return parts

    def _shaped(self, xp: Any, joined: Array) -> Params:
        shapes = self.covered()
        return {name: xp.reshape(part, shapes[name]) for name, part in self._parts(joined).items()}
