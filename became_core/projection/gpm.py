"""GPM, gradient projection memory (Saha, Garg & Roy, ICLR 2021, arXiv 2103.09762, Algorithm 1).

With R the layer's inputs (patches) of a task as columns, M the kept basis and epsilon_t the threshold:

    residual  R' = R - M M^T R                                                       (eq. 8)
    keep      the fewest leading left singular vectors u_i of R' with
              |M M^T R|^2 + sum_{i<=k} sigma_i^2 >= epsilon_t |R|^2                    (eq. 9)
    update    G <- G - G M M^T                                                       (eqs. 6, 7)

What differs: the singular vectors come from the Gram matrix C = R R^T, summed in one pass over the samples, since only
left vectors and squared singular values are asked for.
"""

from dataclasses import dataclass, field, replace
from typing import Self

from became_core.arrays import Array, Params, device, namespace
from became_core.errors import BecameError

__all__ = ["GPM"]


@dataclass(frozen=True)
class GPM:
    """The bases kept so far.

    Attributes:
        threshold: epsilon for the first task, in (0, 1].
        increment: what epsilon grows by from task to task; it never exceeds 1.
        tasks: how many tasks it remembers.
        bases: for each protected weight, orthonormal columns [d_in, rank].
    """

    threshold: float
    increment: float = 0.0
    tasks: int = 0
    bases: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the threshold."""
        if not 0 < self.threshold <= 1:
            raise BecameError(f"the GPM threshold is {self.threshold}; it must be above 0 and at most 1.")

    def project(self, updates: Params) -> Params:
        """Return G - G M M^T for each weight with a basis; the others unchanged."""
        return {name: self._project(name, update) for name, update in updates.items()}

    def _project(self, name: str, update: Array) -> Array:
        if name not in self.bases:
            return update
        xp = namespace(update=update, basis=self.bases[name])
        matrix = xp.reshape(update, (update.shape[0], -1))
        return xp.reshape(self.project_rows(name, matrix), update.shape)

    def project_rows(self, name: str, rows: Array) -> Array:
        """Return rows - rows M M^T; unchanged where the weight has no basis."""
        if name not in self.bases:
            return rows
        xp = namespace(rows=rows, basis=self.bases[name])
        return _complement(rows, xp.astype(self.bases[name], rows.dtype, copy=False))

    def remember(self, grams: Params) -> Self:
        """Return the memory with the directions added that one more task needs.

        Raises:
            BecameError: if a Gram matrix does not fit the basis kept for its weight.
        """
        epsilon = min(self.threshold + self.increment * self.tasks, 1.0)
        bases = {name: _extended(name, self.bases.get(name), gram, epsilon) for name, gram in grams.items()}
        return replace(self, tasks=self.tasks + 1, bases=self.bases | bases)

    @property
    def ranks(self) -> dict[str, tuple[int, int]]:
        """For each protected weight, the rank of its basis and the width of its input space."""
        return {name: (int(basis.shape[1]), int(basis.shape[0])) for name, basis in self.bases.items()}


def _extended(name: str, basis: Array | None, gram: Array, epsilon: float) -> Array:
    xp = namespace(gram=gram) if basis is None else namespace(gram=gram, basis=basis)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or (basis is not None and gram.shape[0] != basis.shape[0]):
        width = "square" if basis is None else f"[{basis.shape[0]}, {basis.shape[0]}]"
        raise BecameError(f"the Gram matrix of '{name}' has shape {tuple(gram.shape)}; it must be {width}.")
    # In float64: a Gram matrix squares the condition number, and this happens once a task.
    c = xp.astype(gram, xp.float64)
    total = xp.linalg.trace(c)
    if basis is None:
        kept = xp.zeros((c.shape[0], 0), dtype=xp.float64, device=device(c))
    else:
        kept = xp.astype(basis, xp.float64)
    residual = _complement(xp.matrix_transpose(_complement(c, kept)), kept)
    captured = total - xp.linalg.trace(residual)
    values, vectors = xp.linalg.eigh((residual + xp.matrix_transpose(residual)) / 2)
    values, vectors = xp.flip(values), xp.flip(vectors, axis=1)  # leading first
    room = c.shape[0] - kept.shape[1]
    reached = captured + xp.cumulative_sum(xp.clip(values[:room], 0.0, None))
    missing = int(xp.sum(xp.astype(reached < epsilon * total, xp.int64)))  # how many prefixes fall short
    count = 0 if captured >= epsilon * total else min(missing + 1, room)
    # Once more out of the kept space, and orthonormal among themselves: rounding must not build up over tasks.
    leading = _complement(xp.matrix_transpose(vectors[:, :count]), kept)
    added = xp.linalg.qr(xp.matrix_transpose(leading))[0]
    return xp.astype(xp.concat([kept, added], axis=1), gram.dtype)


def _complement(rows: Array, basis: Array) -> Array:
    xp = namespace(rows=rows, basis=basis)
    return rows - xp.matmul(xp.matmul(rows, basis), xp.matrix_transpose(basis))
