"""One weight's linear map of rows, rows -> rows P with P = I - M diag(importance) M^T, in the cheapest form.

It is applied at every step of training, so it is prepared once: of two factors M [d, k] and, orthonormal, the rest N
[d, d - k], the thinner serves,

    P = I - F F^T    with F = M sqrt(importance)    where k <= d / 2
    P = F F^T        with F = N                     where not, and every importance is 1
    P = F            [d, d]                         where not, and some are smaller

at a cost of 4 d min(k, d - k) a row, or 2 d^2 for the last. A full space has an N without columns: exact zeros.
Convention: prepared in float64 from the basis as it is kept, so that a memory that was stored gives the same bits.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

from became_core.arrays import Array, device, namespace, pytree, reduction_dtype, static
from became_core.errors import BecameError
from became_core.projection.energy import complement, wide

__all__ = ["Subspace"]


@pytree
@dataclass(frozen=True)
class Subspace:
    """A protected subspace of rows, and how rows are projected out of it; made by ``Subspace.of``.

    Attributes:
        basis: M, orthonormal columns [d, k].
        importance: [k], in [0, 1]: the share that each direction's part of a row is reduced by.
        factor: F, as above.
        form: what P is in terms of F.
        protected: the trace of I - P, which is the sum of importances, rounded down.
    """

    basis: Array
    importance: Array
    factor: Array
    form: Literal["I - F F^T", "F F^T", "F"] = static()
    protected: int = static()

    @classmethod
    def of(cls, basis: Array, importance: Array | None = None) -> Self:
        """Prepare the map of a basis [d, k]; each importance [k] is 1 if none are given."""
        xp: Any = namespace(basis=basis)
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
        """Return rows P, [n, d], in the rows' dtype; computed in the wider of theirs and the basis's.

        Raises:
            BecameError: if the rows are of another width; the name is what the message should call the weight.
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
        along = xp.matmul(rows, factor)
        if self.form == "F":
            return along
        within = xp.matmul(along, xp.matrix_transpose(factor))
        return within if self.form == "F F^T" else rows - within
