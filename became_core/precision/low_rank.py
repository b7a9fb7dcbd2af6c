"""The low-rank precision, U diag(s) U^T + a diagonal, over all parameters jointly (gradients of a few samples, say).

Convention: U holds, for each parameter, its rows of r common columns, [*shape, r]. With W = U sqrt(s), D the diagonal
and C = I + W^T D^-1 W [r, r], all that needs an inverse is exact (Woodbury; the matrix determinant lemma):

    P^-1    = D^-1 - D^-1 W C^-1 W^T D^-1
    log det = log det D + log det C

Both terms of P^-1 are C times as large as their difference. So what needs an inverse is computed in float64, and it is
refused where JAX has none, or where float64 is not enough either.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from became_core.arrays import Array, Params, check_values, device, namespace, pytree, row_products
from became_core.errors import BecameError
from became_core.precision.base import Precision
from became_core.precision.diagonal import Diagonal
from became_core.precision.sums import Isotropic
from became_core.precision.vectors import (
    Rows,
    Shape,
    amount_in,
    check_amount,
    flat,
    identity,
    parted,
    size,
    whole,
    wide,
)

__all__ = ["LowRank"]

# The share of an entry of the inverse that rounding may be.
LOST = 1e-2


@pytree
@dataclass(frozen=True)
class LowRank(Precision):
    """A precision of r directions with their curvatures, on top of a diagonal.

    Attributes:
        factors: U by parameter name, [*shape, r]; zero for the diagonal's other parameters. Columns need not be
            orthonormal.
        scales: s [r], at least 0.
        diagonal_part: covers all parameters, those of U among them.

    Raises:
        BecameError: if a scale is negative or not a number, or U does not fit the scales and the diagonal.

    Example:
        >>> import numpy as np
        >>> precision = LowRank({"w": np.asarray([[1.0], [0.0]])}, np.asarray([4.0]), Diagonal({"w": np.ones(2)}))
        >>> precision.diagonal()["w"].tolist()
        [5.0, 1.0]
    """

    factors: Params
    scales: Array
    diagonal_part: Diagonal

    def __post_init__(self) -> None:
        """Check the scales, and that the parts fit."""
        xp = namespace(scales=self.scales)
        if self.scales.ndim != 1:
            raise BecameError(f"the scales have shape {tuple(self.scales.shape)}; they must be a vector.")
        check_values(xp.all(self.scales >= 0), "the scales have negative or NaN entries; they must be at least 0.")
        shapes = self.covered()
        for name, factor in self.factors.items():
            if name not in shapes:
                raise BecameError(f"the diagonal lacks '{name}', which has a factor; give it an entry, if of zeros.")
            expected = (*shapes[name], self.scales.shape[0])
            if tuple(factor.shape) != expected:
                raise BecameError(f"the factor of '{name}' has shape {tuple(factor.shape)}; it must be {expected}.")

    def covered(self) -> dict[str, Shape]:
        """Return the shapes of the diagonal's parameters."""
        return self.diagonal_part.covered()

    def diagonal(self) -> Params:
        """Return the sum over columns of s U^2, plus the diagonal part."""
        xp, dtype = self._common([], ())
        diagonals = {}
        for name, value in self.diagonal_part.values.items():
            columns = self._columns(name, xp, dtype)
            explained = xp.sum(columns * columns * wide(xp, self.scales, dtype), axis=1)
            diagonals[name] = xp.reshape(flat(xp, value, dtype) + explained, value.shape)
        return diagonals

    def inverse_diagonal(self) -> Params:
        """Return the marginal variances."""
        xp, own = self._common([], ())
        dtype = xp.result_type(xp.float64)
        lower = xp.linalg.cholesky(self._capacitance(xp, dtype))
        variances = {}
        for name, value in self.diagonal_part.values.items():
            d = flat(xp, value, dtype)
            explained = xp.linalg.solve(lower, xp.matrix_transpose(self._root(name, xp, dtype) / d[:, None]))
            variance = 1.0 / d - xp.sum(explained * explained, axis=0)
            variances[name] = wide(xp, xp.reshape(variance, value.shape), own)
        return variances

    def log_determinant(self) -> Array:
        """Return log det D + log det C."""
        xp, own = self._common([], ())
        lower = xp.linalg.cholesky(self._capacitance(xp, xp.result_type(xp.float64)))
        of_capacitance = 2.0 * xp.sum(xp.log(xp.linalg.diagonal(lower)))
        return wide(xp, self.diagonal_part.log_determinant(), own) + wide(xp, of_capacitance, own)

    def damped(self, amount: Array | float) -> "LowRank":
        """Return the precision with the amount added to its diagonal part."""
        return LowRank(self.factors, self.scales, self.diagonal_part.damped(amount))

    def __mul__(self, factor: Array | float) -> "LowRank":
        """Return the precision times a number that is at least 0, by which scales and diagonal are multiplied."""
        check_amount(factor, "a precision's factor")
        return LowRank(self.factors, self.scales * amount_in(factor, self.scales), self.diagonal_part * factor)

    def _arrays(self) -> dict[str, Array]:
        factors = {f"the factor of '{name}'": value for name, value in self.factors.items()}
        return {"the scales": self.scales, **factors, **self.diagonal_part._arrays()}

    def _gram(self, left: Rows, right: Rows) -> Array:
        return self._gram_of(self._sums(left, right), left.xp, left.dtype)

    def _sums(self, left: Rows, right: Rows) -> list[Array]:
        # What is linear in a direction is summed over its parameters before it is multiplied by the other one's.
        sides = (left,) if left is right else (left, right)
        return [self.diagonal_part._gram(left, right), *(self._along(rows) for rows in sides)]

    def _gram_of(self, sums: Sequence[Array], xp: Any, dtype: Any) -> Array:
        scaled = sums[1] * wide(xp, self.scales, dtype)
        return sums[0] + xp.matmul(scaled, xp.matrix_transpose(sums[-1]))

    def _along(self, rows: Rows) -> Array:
        """The directions' coefficients along U's columns, [K, r]."""
        if rows.flattens:
            return sum(
                row_products(rows.of(name), rows.xp.matrix_transpose(self._columns(name, rows.xp, rows.dtype)))
                for name in self.covered()
            )
        total = rows.xp.zeros((len(rows.directions), self.scales.shape[0]), dtype=rows.dtype)
        for name, factor in self.factors.items():
            axes = tuple(range(factor.ndim - 1))
            of_shape = (tuple(axis + 1 for axis in axes), axes)
            total = total + rows.xp.tensordot(rows.of(name), wide(rows.xp, factor, rows.dtype), axes=of_shape)
        return total

    def _here(self, layouts: Mapping[str, Any]) -> "LowRank":
        factors = {name: layouts[name].part(value) for name, value in self.factors.items()}
        return LowRank(factors, whole("the scales", self.scales), self.diagonal_part._here(layouts))

    def _diagonal_here(self, layouts: Mapping[str, Any]) -> Params:
        return self._here(layouts).diagonal()  # of this process's rows of U, so that no other's are needed

    def _times(self, vector: Params) -> Params:
        xp, dtype = _kind(vector)
        inner = sum(xp.matmul(xp.matrix_transpose(self._columns(name, xp, dtype)), u) for name, u in vector.items())
        inner = inner * wide(xp, self.scales, dtype)
        product = self.diagonal_part._times(vector)
        return {name: value + xp.matmul(self._columns(name, xp, dtype), inner) for name, value in product.items()}

    def _solved(self, vector: Params) -> Params:
        return _in_double(self._solved_in_double, vector)

    def _coloured(self, noise: Params) -> Params:
        return _in_double(self._coloured_in_double, noise)

    def _solved_in_double(self, vector: Params) -> Params:
        xp, dtype = _kind(vector)
        capacitance = self._capacitance(xp, dtype)
        inner = self._projected(self.diagonal_part._solved(vector), xp, dtype)
        inner = xp.linalg.solve(capacitance, inner)
        return self.diagonal_part._solved(
            {name: value - xp.matmul(self._root(name, xp, dtype), inner) for name, value in vector.items()}
        )

    def _coloured_in_double(self, noise: Params) -> Params:
        # With V = D^-1/2 W and C = I + V^T V = L L^T, the map T = I - V L^-T (I + L)^-1 V^T has
        # T T^T = I - V C^-1 V^T = (I + V V^T)^-1, and S = D^-1/2 T.
        xp, dtype = _kind(noise)
        lower = xp.linalg.cholesky(self._capacitance(xp, dtype))
        inner = self._projected(self.diagonal_part._coloured(noise), xp, dtype)
        inner = xp.linalg.solve(identity(xp, lower) + lower, inner)
        inner = xp.linalg.solve(xp.matrix_transpose(lower), inner)
        pulled = self.diagonal_part._coloured({name: xp.matmul(self._root(name, xp, dtype), inner) for name in noise})
        return self.diagonal_part._coloured({name: value - pulled[name] for name, value in noise.items()})

    def _matrix(self, xp: Any, dtype: Any) -> Array:
        columns = xp.concat([self._columns(name, xp, dtype) for name in sorted(self.covered())], axis=0)
        scaled = columns * wide(xp, self.scales, dtype)
        return xp.matmul(scaled, xp.matrix_transpose(columns)) + self.diagonal_part._matrix(xp, dtype)

    def _combined(self, other: Precision) -> Precision | None:
        if isinstance(other, Diagonal | Isotropic):
            # Parameters that only the other one covers are added with their diagonal, and no factor.
            return LowRank(self.factors, self.scales, self.diagonal_part + other)  # type: ignore[arg-type]
        if not isinstance(other, LowRank):
            return None
        xp = namespace(left=self.scales, right=other.scales)
        dtype = xp.result_type(*(array.dtype for one in (self, other) for array in one._arrays().values()))
        diagonal = self.diagonal_part + other.diagonal_part
        factors = {}
        for name, shape in diagonal.covered().items():
            columns = []
            for one, another in ((self, other), (other, self)):
                rank = (*shape, one.scales.shape[0])
                if name in one.factors:
                    columns.append(wide(xp, one.factors[name], dtype))
                elif name in another.factors:  # zeros that are cut among processes as those are
                    columns.append(xp.broadcast_to(wide(xp, another.factors[name][..., :1] * 0, dtype), rank))
                else:
                    columns.append(xp.zeros(rank, dtype=dtype, device=device(self.scales)))
            factors[name] = xp.concat(columns, axis=-1)
        scales = xp.concat([wide(xp, one.scales, dtype) for one in (self, other)], axis=0)
        return LowRank(factors, scales, diagonal)  # type: ignore[arg-type]

    def _restricted(self, names: Collection[str]) -> "LowRank":
        factors, values = (parted(tree, names)[0] for tree in (self.factors, self.diagonal_part.values))
        return LowRank(factors, self.scales, Diagonal(values))

    def _joint(self) -> Iterable[str]:
        return self.covered()

    def _columns(self, name: str, xp: Any, dtype: Any) -> Array:
        """A parameter's rows of U, [rows, r]; zeros if it has no factor."""
        shape = (size(self.covered()[name]), self.scales.shape[0])
        if name not in self.factors:
            return xp.zeros(shape, dtype=dtype, device=device(self.scales))
        return wide(xp, xp.reshape(self.factors[name], shape), dtype)

    def _root(self, name: str, xp: Any, dtype: Any) -> Array:
        """A parameter's rows of W = U sqrt(s), [size, r]."""
        return self._columns(name, xp, dtype) * xp.sqrt(wide(xp, self.scales, dtype))

    def _projected(self, vector: Params, xp: Any, dtype: Any) -> Array:
        """W^T times a vector, [r]."""
        return sum(xp.matmul(xp.matrix_transpose(self._root(name, xp, dtype)), vector[name]) for name in vector)

    def _capacitance(self, xp: Any, dtype: Any) -> Array:
        """C, [r, r]; at least the identity, so that its Cholesky decomposition exists whatever the scales.

        Raises:
            BecameError: if the diagonal has a zero, or is so small beside the rest that digits of P^-1 would be lost.
        """
        self.diagonal_part._check_positive(self.covered())
        total = identity(xp, wide(xp, self.scales, dtype))
        for name in self.factors:
            root = self._root(name, xp, dtype)
            d = flat(xp, self.diagonal_part.values[name], dtype)
            total = total + xp.matmul(xp.matrix_transpose(root), root / d[:, None])
        check_values(
            xp.max(xp.linalg.diagonal(total)) * float(xp.finfo(total.dtype).eps) <= LOST,
            "the diagonal of a low-rank precision is so small beside its factors that its inverse would be rounding; "
            "add a multiple of the identity with `damped`, or compute in float64.",
        )
        return total


def _in_double(function: Callable[[Params], Params], vector: Params) -> Params:
    """Return what a function makes of a vector in float64 (float32, where JAX has no other), in the vector's dtype."""
    xp, dtype = _kind(vector)
    double = xp.result_type(xp.float64)
    result = function({name: wide(xp, value, double) for name, value in vector.items()})
    return {name: wide(xp, value, dtype) for name, value in result.items()}


def _kind(vector: Params) -> tuple[Any, Any]:
    first = next(iter(vector.values()))
    return namespace(vector=first), first.dtype
