"""GPM, gradient projection memory (Saha, Garg & Roy, ICLR 2021, arXiv 2103.09762, Algorithm 1).

With R a task's inputs to a layer (the patches of a convolution) as columns, M the basis of the old tasks and epsilon_t
the threshold:

    residual  R' = R - M M^T R                                                       (eq. 8)
    added     the fewest leading left singular vectors u_i of R' with
              |M M^T R|^2 + sum_{i<=k} sigma_i^2 >= epsilon_t |R|^2                    (eq. 9)
    update    G <- G - G M M^T                                                       (eqs. 6, 7)

What differs: the singular vectors come from the Gram matrix R R^T / n; its scale does not matter. A direction whose
energy is rounding is never added, not even at a threshold of 1. An embedding's inputs are one-hot vectors, whose
singular vectors are the axes: its rows that are looked up most are protected.
"""

from dataclasses import dataclass
from typing import Any, Self

from became_core.arrays import Array, namespace, pytree
from became_core.projection.base import FinishedTask
from became_core.projection.layerwise import ThresholdProjector
from became_core.projection.subspace import Subspace

__all__ = ["GPM"]


@pytree
@dataclass(frozen=True)
class GPM(ThresholdProjector):
    """Gradient projection memory: updates leave the space of old tasks' layer inputs (Saha 2021).

    The memory is a basis of that space for each weight. The settings are those of ``ThresholdProjector``.

    Examples:
        >>> import numpy as np
        >>> inputs = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])  # two samples of three units
        >>> class Task:
        ...     def input_grams(self):
        ...         return {"fc.weight": inputs.T @ inputs / 2}
        >>> memory = GPM(threshold=1.0).remember(Task())
        >>> memory.rank
        {'fc.weight': (2, 3)}
        >>> np.allclose(memory.project({"fc.weight": np.ones((1, 3))})["fc.weight"], [[0.0, 0.0, 1.0]])
        True
    """

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with the directions that one more task needs.

        Raises:
            BecameError: if a Gram matrix is not square, not finite, or does not fit the basis of its weight.
        """
        return self._remembering({name: self._grown(name, gram) for name, gram in task.input_grams().items()})

    def _grown(self, name: str, gram: Array) -> Subspace:
        if len(gram.shape) == 1:
            xp: Any = namespace(gram=gram)
            return Subspace.of(xp.astype(self._axes(name, gram), gram.dtype))
        parts, count = self._residual(name, gram)
        return Subspace.of(self._extended(name, parts.directions[:, :count], gram))
