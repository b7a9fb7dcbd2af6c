"""NSCL, training in the null space of feature covariance (Wang, Li, Sun & Xu, CVPR 2021, arXiv 2103.07113).

With R_t a task's inputs to a layer as columns and U the optimiser's update (the paper's optimiser is Adam):

    covariance  C = sum_t R_t R_t^T / n_t, uncentred
    null space  V = eigenvectors of C with eigenvalue <= a lambda_min
    update      U <- U V V^T / |V V^T|_F

What differs: lambda_min is at least the rounding of the trace of C, because smaller eigenvalues, and their ratios, are
noise; an exact null space is therefore found whole. ``floored=False`` is the published rule, which compares eigenvalues
with the smallest one whatever it is. The floor matters: after one task of CIFAR-100 with a = 10, the published rule
leaves 10 null dimensions in fc1 of the AlexNet-like network and 8 in fc2, the floor 622 and 545. A run's record has
them: the width of a layer less its rank. ``normalised=False`` leaves out the division by |V V^T|_F, which
only multiplies each weight's learning rate by 1 / sqrt(dim V).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, pytree, static
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask
from became_core.projection.layerwise import LayerwiseProjector
from became_core.projection.subspace import Subspace, checked_energies, checked_gram, rounding, spectrum, wide
from became_core.registry import setting

__all__ = ["NSCL"]


@pytree
@dataclass(frozen=True)
class NSCL(LayerwiseProjector):
    """Training in the null space of old tasks' input covariance (Wang 2021).

    The memory is the sum of the tasks' covariances, and a basis of the directions that are not null.

    Attributes:
        ratio: how far above the smallest eigenvalue a direction still counts as null, a in the paper; at least 1.
        floored: whether the smallest eigenvalue counts as at least the rounding of the trace of C; if not, which is the
            published rule, few directions are null where there is an exact null space.
        normalised: whether a projected update is divided by |V V^T|_F.
        covariances: C of each weight, [d_in, d_in].

    Raises:
        BecameError: if the ratio is below 1.

    Examples:
        >>> import numpy as np
        >>> class Task:
        ...     def input_grams(self):
        ...         return {"fc.weight": np.diag([4.0, 1.0, 0.0])}
        >>> memory = NSCL(normalised=False).remember(Task())
        >>> memory.project({"fc.weight": np.ones((1, 3))})
        {'fc.weight': array([[0., 0., 1.]])}
    """

    ratio: float = setting(10.0, option="nscl_ratio")
    floored: bool = setting(True, option="nscl_floored")
    normalised: bool = static(default=True)
    covariances: Params = field(default_factory=dict, kw_only=True)

    beside: ClassVar[tuple[str, ...]] = ("covariances",)

    def __post_init__(self) -> None:
        """Check the ratio."""
        super().__post_init__()
        if not self.ratio >= 1:
            raise BecameError(f"the NSCL ratio is {self.ratio}; it must be at least 1.")

    def project_rows(self, name: str, rows: Array) -> Array:
        """Return rows V V^T / |V V^T|_F, or the rows as they are if the weight has no covariance."""
        projected = super().project_rows(name, rows)
        if not self.normalised or name not in self.spaces:
            return projected
        # The direction of the smallest eigenvalue always counts as null, so the width is greater.
        occupied, width = self.rank[name]
        return projected / (width - occupied) ** 0.5

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task's covariance.

        Raises:
            BecameError: if a Gram matrix is not square, not finite, or does not fit the covariance so far.
        """
        spaces: dict[str, Subspace] = {}
        covariances: Params = {}
        for name, gram in task.input_grams().items():
            xp: Any = namespace(gram=gram)
            old = self.covariances.get(name)
            if len(gram.shape) == 1:  # the eigenvectors are the axes
                total = checked_energies(name, gram, old)
                total = total if old is None else total + wide(old)
                least = xp.maximum(xp.min(total), rounding(gram, xp.sum(total))) if self.floored else xp.min(total)
                spaces[name] = Subspace.of(xp.astype(total > self.ratio * least, gram.dtype))
                covariances[name] = xp.astype(total, gram.dtype)
                continue
            total = checked_gram(name, gram, None if old is None else int(old.shape[0]))
            total = total if old is None else total + wide(old)
            if self.floored:
                values, vectors = spectrum(total)
                least = xp.maximum(values[-1], rounding(gram, xp.linalg.trace(total)))
            else:  # rounding leaves an eigenvalue of 0 on either side of it, but a singular value, as published, above
                vectors, values, _ = xp.linalg.svd(total)
                least = values[-1]
            occupied = values > self.ratio * least
            count = int(xp.sum(xp.astype(occupied, xp.int32)))
            spaces[name] = Subspace.of(xp.astype(vectors[:, :count], gram.dtype))
            covariances[name] = xp.astype(total, gram.dtype)
        return self._remembering(spaces, covariances=covariances)
