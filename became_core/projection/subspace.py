"""Subspaces of one weight's input space: where a task's energy lies in them, and how rows are projected out of them.

Energy. R holds a task's inputs to a layer as columns, C = R R^T / n is their Gram matrix, and M is the basis that the
memory has already, orthonormal [d, k]. A projector asks for the left singular vectors and the squared singular values
of the residual R' = R - M M^T R. The vectors are orthogonal to M, so they are the eigenvectors of N^T C N, where the
columns of N [d, d - k] complete those of M. That problem gets smaller as the memory fills, and its vectors need no
orthogonalisation. A Gram matrix is enough for all of this, and it can be summed in one pass over the data. A layer with
fewer inputs than columns has a factor F [n, d] instead, with C = F^T F; the smaller matrix F' F'^T [n, n] has the same
eigenvalues, F' being F without its part in M.

Projection. Every training step multiplies rows by P = I - M diag(importance) M^T. P is therefore prepared once, in the
cheapest form:

    P = I - F F^T    with F = M sqrt(importance)    if k <= d / 2
    P = F F^T        with F = N                     if k > d / 2 and every importance is 1
    P = F            [d, d]                         if k > d / 2 and some importance is below 1

It costs 4 d min(k, d - k) operations a row, or 2 d^2 in the last form. If the subspace is the whole space, N has no
columns, and projected rows are exactly zero.

A subspace along axes, as an embedding's is, whose inputs are one-hot vectors, has the axes' importances [d] for a
basis, and P = diag(1 - importance).

Convention: energies are eigenvalues of C, which are mean squares, in descending order. Both parts compute in float64
where the framework has it. P is prepared from the basis in the dtype in which the memory stores it, so that a memory
that was read from a file projects to the same bits.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

from became_core.arrays import Array, check_values, device, eigh, namespace, pytree, reduction_dtype, static
from became_core.errors import BecameError

__all__ = [
    "Energies",
    "Subspace",
    "checked_gram",
    "complement",
    "energies",
    "leading_axes",
    "min_directions",
    "rounding",
    "spectrum",
    "wide",
]

# How many times the rounding of a Gram matrix its decomposition may leave in a direction that has no energy. With a
# threshold of 1, directions of pure rounding would otherwise be remembered.
DECOMPOSED = 4.0


class Energies(NamedTuple):
    """The energy of a Gram matrix [d, d] in the directions of a basis [d, k], and in new directions.

    Attributes:
        total: the trace of the Gram matrix, 0-d.
        floor: an energy up to this value is rounding, 0-d.
        old: the energy along each direction of the basis, [k].
        new: the energy along each new direction, descending; [d - k], or [n] for a factor of n rows.
        directions: the new directions as columns, [d, d - k] or [d, n]; they are orthonormal where their energy is
            above the floor.
        captured: the energy within the span of the basis, 0-d.
    """

    total: Array
    floor: Array
    old: Array
    new: Array
    directions: Array
    captured: Array


def wide(array: Array) -> Array:
    """Return an array in float64, or in float32 where JAX has no float64."""
    xp: Any = namespace(array=array)
    return xp.astype(array, xp.result_type(xp.float64), copy=False)


def checked_gram(name: str, gram: Array, width: int | None) -> Array:
    """Return a Gram matrix [d, d] in float64.

    Args:
        name: what a message calls its weight.
        gram: the Gram matrix [d, d], or a factor F [n, d] of it with n < d.
        width: the d that it must have; any if None.

    Raises:
        BecameError: if it is neither square nor a factor, does not have the width, or is not finite.
    """
    gram = _checked(name, gram, width)
    if not _is_factor(gram):
        return gram
    xp: Any = namespace(factor=gram)
    return xp.matmul(xp.matrix_transpose(gram), gram)


def _checked(name: str, gram: Array, width: int | None) -> Array:
    xp: Any = namespace(gram=gram)
    shape = tuple(gram.shape)
    if len(shape) != 2 or shape[0] > shape[1] or width not in (None, shape[1]):
        expected = "square" if width is None else f"[{width}, {width}]"
        raise BecameError(
            f"the Gram matrix of '{name}' has shape {shape}; it must be {expected}, or a factor of fewer rows."
        )
    check_values(xp.all(xp.isfinite(gram)), f"the Gram matrix of '{name}' is not finite; look for NaN in the network.")
    return wide(gram)


def _is_factor(gram: Array) -> bool:
    return int(gram.shape[0]) < int(gram.shape[1])


def complement(basis: Array) -> Array:
    """Return orthonormal columns [d, d - k] that complete the columns of an orthonormal basis [d, k].

    Examples:
        >>> import numpy as np
        >>> np.abs(complement(np.array([[1.0], [0.0]])))
        array([[0.],
               [1.]])
    """
    xp: Any = namespace(basis=basis)
    width, rank = basis.shape
    if not rank:
        return xp.eye(width, dtype=basis.dtype, device=device(basis))
    return xp.linalg.qr(basis, mode="complete")[0][:, rank:]


def rounding(gram: Array, total: Array) -> Array:
    """Return the energy up to which an eigenvalue of a Gram matrix is rounding: its trace times its dtype's epsilon.

    The dtype is that in which the Gram matrix was summed, not that in which it is decomposed: float64 arithmetic
    cannot bring back digits that a float32 sum has lost.
    """
    xp: Any = namespace(gram=gram)
    return total * float(xp.finfo(gram.dtype).eps)


def spectrum(symmetric: Array) -> tuple[Array, Array]:
    """Return the eigenvalues of a positive semi-definite matrix, descending and at least 0, and its eigenvectors."""
    xp: Any = namespace(symmetric=symmetric)
    values, vectors = eigh((symmetric + xp.matrix_transpose(symmetric)) / 2)
    return xp.clip(xp.flip(values), 0.0, None), xp.flip(vectors, axis=1)


def energies(name: str, gram: Array, basis: Array | None) -> Energies:
    """Return the energy of a Gram matrix in the directions of a basis, and in new directions.

    Args:
        name: what a message calls its weight.
        gram: the Gram matrix [d, d], or a factor F [n, d] of it with n < d.
        basis: orthonormal columns [d, k]; None for no direction.

    Raises:
        BecameError: if the Gram matrix is not square, not finite, or does not fit the basis.

    Examples:
        >>> import numpy as np
        >>> parts = energies("fc.weight", np.diag([4.0, 1.0, 0.0]), np.array([[1.0], [0.0], [0.0]]))
        >>> parts.old, parts.new
        (array([4.]), array([1., 0.]))
    """
    xp: Any = namespace(gram=gram) if basis is None else namespace(gram=gram, basis=basis)
    c = _checked(name, gram, None if basis is None else int(basis.shape[0]))
    m = xp.matrix_transpose(c)[:, :0] if basis is None else wide(basis)
    if _is_factor(c):
        return _energies_of_factor(c, m, gram)
    if m.shape[1]:
        n = complement(m)
        new, vectors = spectrum(xp.matmul(xp.matmul(xp.matrix_transpose(n), c), n))
        directions = xp.matmul(n, vectors)
    else:
        new, directions = spectrum(c)
    total = xp.linalg.trace(c)
    return Energies(
        total=total,
        floor=DECOMPOSED * rounding(gram, total),
        old=xp.clip(xp.sum(m * xp.matmul(c, m), axis=0), 0.0, None),
        new=new,
        directions=directions,
        captured=total - xp.sum(new),
    )


def _energies_of_factor(factor: Array, m: Array, gram: Array) -> Energies:
    xp: Any = namespace(factor=factor)
    residual = factor
    # One subtraction leaves a part in M as large as the rounding of the factor itself, which can be large beside a
    # small residual; the second subtraction removes that.
    for _ in range(2 if m.shape[1] else 0):
        residual = residual - xp.matmul(xp.matmul(residual, m), xp.matrix_transpose(m))
    new, vectors = spectrum(xp.matmul(residual, xp.matrix_transpose(residual)))
    total = xp.sum(factor * factor)
    floor = DECOMPOSED * rounding(gram, total)
    # A direction without energy is never used: dividing by 1 there only keeps it finite.
    sigma = xp.sqrt(xp.where(new > floor, new, xp.ones_like(new)))
    directions = xp.matmul(xp.matrix_transpose(residual), vectors) / sigma
    return Energies(
        total=total,
        floor=floor,
        old=xp.sum(xp.square(xp.matmul(factor, m)), axis=0),
        new=new,
        directions=_orthonormal(directions - xp.matmul(m, xp.matmul(xp.matrix_transpose(m), directions))),
        captured=total - xp.sum(new),
    )


def _orthonormal(columns: Array) -> Array:
    """Return nearly orthonormal columns, in descending order of energy, as orthonormal ones.

    They are products of the residual that were divided by sigma, and with it the rounding of the largest energy: those
    of an energy near the floor would have a tenth of their length in common.
    """
    xp: Any = namespace(columns=columns)
    q, r = xp.linalg.qr(columns)
    turned = xp.linalg.diagonal(r) < 0
    return xp.where(turned, -q, q)


def min_directions(values: Array, wanted: Array, *, captured: Array | float = 0.0, floor: Array | float = 0.0) -> int:
    """Return the smallest number of leading directions whose energies reach a wanted energy.

    Args:
        values: the energy of each direction, [n], in the order in which directions are taken.
        wanted: the energy to reach, 0-d.
        captured: the energy that is reached without any of these directions.
        floor: a direction with an energy up to this value is not taken, even if the wanted energy is not reached.

    Examples:
        >>> import numpy as np
        >>> min_directions(np.array([4.0, 2.0, 1.0]), np.asarray(5.0))
        2
    """
    xp: Any = namespace(values=values)
    if not values.shape[0] or bool(wanted <= captured):
        return 0
    short = int(xp.sum(xp.astype(captured + xp.cumulative_sum(values) < wanted, xp.int32)))
    return min(short + 1, int(xp.sum(xp.astype(values > floor, xp.int32))))


def checked_energies(name: str, energies: Array, old: Array | None) -> Array:
    """Return the diagonal of a Gram matrix, [d], in at least float32.

    Args:
        name: what a message calls the weight.
        energies: the diagonal, [d].
        old: what the memory has of the axes, [d]; None if it has nothing.

    Raises:
        BecameError: if the energies are not finite, or not as many as the axes of the memory.
    """
    if old is not None and old.shape != energies.shape:
        raise BecameError(f"'{name}' has {energies.shape[0]} rows; its memory is one of {old.shape[0]}.")
    xp = namespace(energies=energies)
    check_values(xp.all(xp.isfinite(energies)), f"the inputs of '{name}' are not finite; look for NaN in the network.")
    return wide(energies)


def leading_axes(name: str, energies: Array, old: Array | None, share: float) -> Array:
    """Return which axes a subspace along axes needs beside those that it has, booleans [d].

    They are the fewest whose energies, with those of the old axes, are a share of the total.

    Args:
        name: what a message calls the weight.
        energies: the diagonal of a Gram matrix, [d].
        old: the importances of the axes in the memory; None if there are none.
        share: in (0, 1].

    Raises:
        BecameError: if the energies are not finite, or not as many as the axes of the memory.

    Examples:
        >>> import numpy as np
        >>> leading_axes("words.weight", np.array([1.0, 0.0, 5.0, 4.0]), None, 0.9)
        array([False, False,  True,  True])
    """
    xp: Any = namespace(energies=energies)
    values = checked_energies(name, energies, old)
    is_old = xp.zeros_like(values) > 0 if old is None else old > 0
    new = xp.where(is_old, xp.zeros_like(values), values)
    order = xp.argsort(-new, stable=True)
    total = xp.sum(values)
    count = min_directions(xp.take(new, order, axis=0), share * total, captured=total - xp.sum(new))
    # The place of each axis in the order is where the order's own order has it.
    return xp.argsort(order, stable=True) < count


@pytree
@dataclass(frozen=True)
class Subspace:
    """A protected subspace of rows, and the map P that projects rows out of it; ``Subspace.of`` makes it.

    Attributes:
        basis: M, orthonormal columns [d, k]; or, along axes, their importances [d].
        importance: [k], in [0, 1]: the share of each direction's part that is removed from a row.
        factor: F, in the notation of this module.
        form: how P is computed from F.
        protected: the sum of the importances, rounded down, which is the trace of I - P.

    Examples:
        >>> import numpy as np
        >>> space = Subspace.of(np.array([[1.0], [0.0], [0.0]]), importance=np.array([0.5]))
        >>> space.project_rows("fc.weight", np.array([[2.0, 3.0, 4.0]]))
        array([[1., 3., 4.]])
    """

    basis: Array
    importance: Array
    factor: Array
    form: Literal["I - F F^T", "F F^T", "F", "diag F"] = static()
    protected: int = static()

    @classmethod
    def of(cls, basis: Array, importance: Array | None = None) -> Self:
        """Return the subspace of a basis [d, k], with an importance [k] of its directions; each is 1 if None.

        Of importances of axes [d] in the place of a basis, it is the subspace along these axes.
        """
        xp: Any = namespace(basis=basis)
        if len(basis.shape) == 1:
            return cls(basis, basis, 1 - basis, "diag F", int(float(xp.sum(wide(basis))) // 1))
        width, rank = (int(size) for size in basis.shape)
        if importance is None:
            importance = xp.ones((rank,), dtype=basis.dtype, device=device(basis))
        whole = bool(xp.all(importance == 1))
        protected = rank if whole else int(float(xp.sum(wide(importance))) // 1)
        if 2 * rank <= width:
            root = basis if whole else xp.astype(wide(basis) * xp.sqrt(wide(importance)), basis.dtype)
            return cls(basis, importance, root, "I - F F^T", protected)
        if whole:
            return cls(basis, importance, xp.astype(complement(wide(basis)), basis.dtype), "F F^T", protected)
        m = wide(basis)
        identity = xp.eye(width, dtype=m.dtype, device=device(basis))
        dense = identity - xp.matmul(m * wide(importance), xp.matrix_transpose(m))
        return cls(basis, importance, xp.astype(dense, basis.dtype), "F", protected)

    def project_rows(self, name: str, rows: Array) -> Array:
        """Return rows P, [n, d], in the dtype of the rows; the arithmetic is in the wider dtype of rows and basis.

        Args:
            name: what a message calls the weight.
            rows: [n, d].

        Raises:
            BecameError: if the rows have another width than the basis.
        """
        xp: Any = namespace(rows=rows, factor=self.factor)
        if rows.shape[-1] != self.factor.shape[0]:
            raise BecameError(
                f"rows of '{name}' have {rows.shape[-1]} entries; its protected space is one of {self.factor.shape[0]}."
            )
        if rows.dtype == self.factor.dtype:
            return self._applied(xp, rows, self.factor)
        common = reduction_dtype(xp, rows=rows, factor=self.factor)
        return xp.astype(self._applied(xp, xp.astype(rows, common), xp.astype(self.factor, common)), rows.dtype)

    def _applied(self, xp: Any, rows: Array, factor: Array) -> Array:
        if self.form == "diag F":
            return rows * factor
        along = xp.matmul(rows, factor)
        if self.form == "F":
            return along
        within = xp.matmul(along, xp.matrix_transpose(factor))
        return within if self.form == "F F^T" else rows - within
