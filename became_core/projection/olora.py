"""O-LoRA, orthogonal subspaces for low-rank adapters (Wang et al., EMNLP Findings 2023, arXiv 2310.14152).

Each task learns low-rank adapters, W + s B_t A_t. The rows of A_t span the space in which the task moved the weight,
and the space of a new task is to be orthogonal to those of all tasks before:

    orthogonality   sum over old tasks i of sum |A_i A_t^T| = 0                           (the published code's penalty)
    update of A_t   dA <- dA - dA M M^T, with M an orthonormal basis of the rows of all old A_i; the rows with which A_t
                    begins are projected as well

What differs: the paper adds the sum to the loss, with a strength that is chosen for each task; here it is a projection,
under which the sum is zero throughout, as at an infinite strength. The published code's penalty on the norms of A and B
is left out. Old adapters are added to the weights, where the paper keeps them beside the weights; the network computes
the same. With another method, such as ``became+olora``, the rows of both stages are remembered.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, namespace, pytree
from became_core.projection.base import FinishedTask, Region
from became_core.projection.layerwise import LayerwiseProjector
from became_core.projection.subspace import Subspace, energies, wide

__all__ = ["OLoRA"]


@pytree
@dataclass(frozen=True)
class OLoRA(LayerwiseProjector):
    """Low-rank adapters whose rows are orthogonal to those of all tasks before (Wang 2023).

    The memory is a basis of the rows of all old A, for each weight. The rank of the adapters is 8, as in the published
    code, unless a run names one.

    Examples:
        >>> import numpy as np
        >>> from became_core.projection import LowRankRegion
        >>> rows = {"fc.weight": np.array([[2.0, 0.0, 0.0]])}
        >>> region = LowRankRegion.initial(rows, {"fc.weight": np.zeros((1, 3))})
        >>> memory = OLoRA().end_stage(0, region)
        >>> memory.project({"fc.weight": np.ones((1, 3))})["fc.weight"]
        array([[0., 1., 1.]])
    """

    own_rank: ClassVar[int] = 8

    def end_stage(self, task: int, region: Region | None) -> Self:
        """Return the memory with the rows of the adapters with which a stage ends."""
        rows = {} if region is None else {name: region.scales[key] for key, name in region.projected_as.items()}
        return replace(self, spaces=self.spaces | {name: self._with_rows(name, it) for name, it in rows.items()})

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory as it is: a task is remembered by its rows alone, and ``end_stage`` has added them."""
        return self._remembering({})

    def _with_rows(self, name: str, rows: Array) -> Subspace:
        """Return a weight's space with the span of rows [r, d_in] added."""
        xp: Any = namespace(rows=rows)
        factor = wide(rows)
        if rows.shape[0] >= rows.shape[1]:  # as many rows as columns are no factor of a Gram matrix
            factor = xp.matmul(xp.matrix_transpose(factor), factor)
        basis = self.bases.get(name)
        parts = energies(name, factor, basis)
        directions = parts.directions[:, : int(xp.sum(xp.astype(parts.new > parts.floor, xp.int32)))]
        # All directions are remembered, also those of little energy, which rounding has turned towards the others.
        if basis is not None:
            known = wide(basis)
            directions = directions - xp.matmul(known, xp.matmul(xp.matrix_transpose(known), directions))
        return Subspace.of(self._extended(name, xp.linalg.qr(directions)[0], rows))
