"""The Kronecker-factored precision, A x G for each weight (Martens and Grosse 2015, arXiv 1503.05671; Ritter 2018).

Convention: a weight W is the matrix [d_out, d_in] that it is when its trailing axes are flattened (OIHW: d_in = I H W;
a vector [d_out]: d_in = 1), and P V = G V A. A [d_in, d_in] comes from a layer's inputs, G [d_out, d_out] from its
output gradients. The unit, a mean or a sum over samples, is that of the product.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from became_core.arrays import Array, Params, check_values, device, namespace, pytree, row_products, static
from became_core.errors import BecameError
from became_core.precision.base import Precision
from became_core.precision.sums import Isotropic
from became_core.precision.vectors import (
    Rows,
    Shape,
    Shapes,
    added,
    amount_in,
    check_amount,
    check_symmetric,
    embedded,
    identity,
    inner_products,
    parted,
    size,
    whole,
    wide,
)

__all__ = ["Kronecker"]


@pytree
@dataclass(frozen=True)
class Kronecker(Precision):
    """A precision of A x G + damping * identity for each weight, and nothing between weights.

    All that needs an inverse is exact, by an eigendecomposition of each factor.

    Attributes:
        factors: (A [d_in, d_in], G [d_out, d_out]) by parameter name, symmetric positive semi-definite.
        damping: a 0-d array by parameter name, at least 0; none is 0.
        shapes: the shape of a weight, by name, in which ``diagonal`` and ``inverse_diagonal`` return it; [d_out, d_in]
            if not given. Directions may have any shape that flattens to [d_out, d_in].

    Raises:
        BecameError: if a factor is not square and symmetric, has negative or NaN entries on its diagonal, or does not
            fit its weight's shape.

    Example:
        >>> import numpy as np
        >>> precision = Kronecker({"w": (np.diag([1.0, 2.0, 3.0]), np.eye(2))})
        >>> precision.diagonal()["w"].tolist()
        [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """

    couples: ClassVar[bool] = True

    factors: Mapping[str, tuple[Array, Array]]
    damping: Params = field(default_factory=dict)
    shapes: Mapping[str, Shape] = static(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the factors."""
        object.__setattr__(self, "shapes", Shapes.of(self.shapes))
        for label, array in self._arrays().items():
            if label.startswith("the damping"):
                check_amount(array, label)
            else:
                check_symmetric(array, label)
        for name in (*self.damping, *self.shapes):
            if name not in self.factors:
                raise BecameError(f"'{name}' has a damping or a shape but no factors; give it factors.")
        for name, shape in self.shapes.items():
            if not self._fits(name, shape):
                d_out, d_in = self._matrix_shape(name)
                raise BecameError(f"'{name}' has shape {shape} but its factors are for [{d_out}, {d_in}].")

    def covered(self) -> dict[str, Shape]:
        """Return the shapes of the weights that have factors."""
        return {name: self.shapes.get(name, self._matrix_shape(name)) for name in self.factors}

    def diagonal(self) -> Params:
        """Return diag(G) diag(A)^T + damping, in each weight's shape."""
        xp, dtype = self._common([], ())
        diagonals = {}
        for name, shape in self.covered().items():
            a, g = (xp.linalg.diagonal(wide(xp, factor, dtype)) for factor in self.factors[name])
            diagonals[name] = xp.reshape(_outer(g, a) + self._damping(name, a), shape)
        return diagonals

    def inverse_diagonal(self) -> Params:
        """Return the marginal variances, in each weight's shape."""
        xp, dtype = self._common([], ())
        variances = {}
        for name, shape in self.covered().items():
            a, g, spectrum = self._positive_eigen(name, xp, dtype)
            variance = xp.matmul(xp.matmul(g * g, 1.0 / spectrum), xp.matrix_transpose(a * a))
            variances[name] = xp.reshape(variance, shape)
        return variances

    def log_determinant(self) -> Array:
        """Return the sum of log(eigenvalue of G * eigenvalue of A + damping)."""
        xp, dtype = self._common([], ())
        return sum(xp.sum(xp.log(self._positive_eigen(name, xp, dtype)[2])) for name in self.factors)

    def damped(self, amount: Array | float) -> "Kronecker":
        """Return the precision with more damping; exact."""
        check_amount(amount, "the damping")
        damping = {}
        for name, (a, _) in self.factors.items():
            before = self._damping(name, a)
            damping[name] = before + amount_in(amount, before)
        return Kronecker(self.factors, damping, self.shapes)

    def __mul__(self, factor: Array | float) -> "Kronecker":
        """Return the precision times a number that is at least 0, by which G and the damping are multiplied."""
        check_amount(factor, "a precision's factor")
        factors = {name: (a, g * amount_in(factor, g)) for name, (a, g) in self.factors.items()}
        damping = {name: value * amount_in(factor, value) for name, value in self.damping.items()}
        return Kronecker(factors, damping, self.shapes)

    def _arrays(self) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for name, (a, g) in self.factors.items():
            arrays |= {f"the factor A of '{name}'": a, f"the factor G of '{name}'": g}
        return arrays | {f"the damping of '{name}'": value for name, value in self.damping.items()}

    def _gram(self, left: Rows, right: Rows) -> Array:
        total = None
        for name in self.factors:
            part = self._block_gram(name, left, right)
            total = part if total is None else total + part
        return total

    def _block_gram(self, name: str, left: Rows, right: Rows) -> Array:
        xp, u, v = left.xp, left.of(name), right.of(name)
        if left.flattens:
            return row_products(u, self._block_times(name, v))
        u, v = (xp.reshape(rows, (rows.shape[0], *self._matrix_shape(name))) for rows in (u, v))
        return inner_products(xp, u, self._matrix_times(name, v))

    def _here(self, layouts: Mapping[str, Any]) -> "Kronecker":
        labels = iter(self._arrays().items())
        factors = {name: (whole(*next(labels)), whole(*next(labels))) for name in self.factors}
        return Kronecker(factors, {name: whole(*next(labels)) for name in self.damping}, self.shapes)

    def _times(self, vector: Params) -> Params:
        return {name: self._block_times(name, u) for name, u in vector.items()}

    def _solved(self, vector: Params) -> Params:
        return {name: self._by_spectrum(name, u, -1.0) for name, u in vector.items()}

    def _coloured(self, noise: Params) -> Params:
        return {name: self._by_spectrum(name, u, -0.5) for name, u in noise.items()}

    def _matrix(self, xp: Any, dtype: Any) -> Array:
        total = self.covered()
        matrices = []
        for name, shape in total.items():
            a, g = (wide(xp, factor, dtype) for factor in self.factors[name])
            d = size(shape)
            block = xp.reshape(g[:, None, :, None] * a[None, :, None, :], (d, d))
            block = block + self._damping(name, a) * identity(xp, block)
            matrices.append(embedded(xp, block, {name: shape}, total))
        return sum(matrices[1:], start=matrices[0])

    def _combined(self, other: Precision) -> Precision | None:
        if isinstance(other, Isotropic) and other.amounts.keys() <= self.factors.keys():
            return Kronecker(self.factors, added(self.damping, other.amounts), {**other.shapes, **self.shapes})
        # A x G + A' x G' is no Kronecker product; of different weights, they stand side by side.
        if not isinstance(other, Kronecker) or set(self.factors) & set(other.factors):
            return None
        damping = added(self.damping, other.damping)
        return Kronecker({**self.factors, **other.factors}, damping, {**self.shapes, **other.shapes})

    def _split(self, names: Collection[str]) -> tuple[Precision, Precision]:
        fields = (self.factors, self.damping, self.shapes)
        inside, outside = zip(*(parted(field, names) for field in fields), strict=True)
        return Kronecker(*inside), Kronecker(*outside)

    def _fits(self, name: str, shape: Shape) -> bool:
        d_out, d_in = self._matrix_shape(name)
        return shape[:1] == (d_out,) and size(shape) == d_out * d_in

    def _matrix_shape(self, name: str) -> Shape:
        a, g = self.factors[name]
        return g.shape[0], a.shape[0]

    def _damping(self, name: str, like: Array) -> Array:
        """A weight's damping, a 0-d array of an array's dtype."""
        xp = namespace(like=like)
        if name in self.damping:
            return wide(xp, self.damping[name], like.dtype)
        return xp.zeros((), dtype=like.dtype, device=device(like))

    def _block_times(self, name: str, vectors: Array) -> Array:
        """G V A + damping V, for flat vectors [..., d_out * d_in]."""
        xp = namespace(vectors=vectors)
        v = xp.reshape(vectors, (*vectors.shape[:-1], *self._matrix_shape(name)))
        return xp.reshape(self._matrix_times(name, v), vectors.shape)

    def _matrix_times(self, name: str, v: Array) -> Array:
        """G V A + damping V, for matrices [..., d_out, d_in]."""
        xp = namespace(v=v)
        a, g = (wide(xp, factor, v.dtype) for factor in self.factors[name])
        return xp.matmul(xp.matmul(g, v), a) + self._damping(name, a) * v

    def _by_spectrum(self, name: str, vector: Array, power: float) -> Array:
        """A power of the block, symmetric like the block itself, times a flat vector."""
        xp = namespace(vector=vector)
        a, g, spectrum = self._positive_eigen(name, xp, vector.dtype)
        v = xp.reshape(vector, self._matrix_shape(name))
        rotated = xp.matmul(xp.matmul(xp.matrix_transpose(g), v), a)
        scaled = rotated * spectrum**power
        return xp.reshape(xp.matmul(xp.matmul(g, scaled), xp.matrix_transpose(a)), vector.shape)

    def _positive_eigen(self, name: str, xp: Any, dtype: Any) -> tuple[Array, Array, Array]:
        """Eigenvectors of A and of G, in columns, and the block's eigenvalues, [d_out, d_in]; all must be positive."""
        (a_values, a_vectors), (g_values, g_vectors) = (
            xp.linalg.eigh(wide(xp, factor, dtype)) for factor in self.factors[name]
        )
        damping = self._damping(name, a_values)
        # Rounding makes a zero slightly negative; two of these would multiply to something positive.
        spectrum = _outer(_at_least_0(xp, g_values), _at_least_0(xp, a_values)) + damping
        rounding = xp.finfo(dtype).eps * max(self._matrix_shape(name))
        check_values(
            xp.min(spectrum) > rounding * xp.max(spectrum),
            f"the precision of '{name}' is singular to rounding and has no inverse; add a multiple of the identity "
            "with `damped`.",
        )
        return a_vectors, g_vectors, spectrum


def _outer(g: Array, a: Array) -> Array:
    return g[:, None] * a[None, :]


def _at_least_0(xp: Any, values: Array) -> Array:
    return xp.where(values > 0, values, xp.zeros_like(values))
