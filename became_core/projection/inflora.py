"""InfLoRA, interference-free low-rank adaptation (Liang & Li, CVPR 2024, arXiv 2404.00228).

Low-rank adapters W + B_t A_t, of which B_t alone is learned. With C a new task's Gram matrix of a layer's inputs as the
task begins, M a basis of the old tasks' inputs, and r the rank:

    rows of A_t    the leading r left singular vectors of C' = C - M M^T C, divided by sqrt(3)       (Algorithm 1)
    memory M       as in GPM, with C in the place of R: after a task, the fewest leading left singular vectors of C'
                   with |M M^T C|^2 + sum sigma_i^2 >= epsilon_t |C|^2                              (DualGPM)

Rows of A_t are orthogonal to M, so that no B_t changes what old inputs give; and in that, they are where the new task's
inputs have most of their energy, so that B_t can learn it.

What differs: the paper writes of the inputs R, while its code has C = R R^T / n in their place, here as there; energies
are then squared eigenvalues of C, of which a threshold keeps fewer directions than of R. The code keeps a basis of the
complement of M once M has more than half of all directions (DualGPM's "retain"), which is the same memory. For the
first task the code takes one direction less than reach epsilon. C has ``projector_samples`` samples of a task here, and
all of them in the code. The code adapts keys and values of attention, which ``--lora-layers`` can choose. Directions
without energy are no rows. With another method, such as ``became+inflora``, the second stage learns both factors, from
random rows.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, pytree
from became_core.projection.base import FinishedTask, TaskStart
from became_core.projection.layerwise import ThresholdProjector
from became_core.projection.subspace import (
    DECOMPOSED,
    Energies,
    Subspace,
    checked_gram,
    energies,
    min_directions,
    rounding,
)

__all__ = ["InfLoRA"]

SHORTENED = math.sqrt(3)  # what rows are divided by, so that they are as long as random ones


@pytree
@dataclass(frozen=True)
class InfLoRA(ThresholdProjector):
    """Low-rank adapters within what old tasks leave free and the new task uses (Liang & Li 2024).

    The memory is a basis of old tasks' inputs for each weight. The settings are those of ``ThresholdProjector``; the
    published threshold of ten tasks is 0.95 with an increment of 0.005. The rank of the adapters is 10, as in the
    published code, unless a run names one.

    Examples:
        >>> import numpy as np
        >>> class Task:
        ...     def input_grams(self):
        ...         return {"fc.weight": np.diag([4.0, 1.0, 0.0])}
        >>> rows = InfLoRA().adapter_rows(Task(), {"fc.weight": np.ones((1, 3))})["fc.weight"]
        >>> np.allclose(np.abs(rows) * 3**0.5, [[1.0, 0.0, 0.0]])
        True
    """

    own_rank: ClassVar[int] = 10
    trains_rows: ClassVar[bool] = False

    def adapter_rows(self, start: TaskStart, drawn: Params) -> Params:
        """Return the rows A of each weight, [r, d_in]: fewer than were drawn if fewer directions have energy.

        A weight in whose input space nothing is left gets a row of zeros, and so stands still.

        Raises:
            BecameError: if a Gram matrix is not square, not finite, or does not fit the basis of its weight.
        """
        grams, rows = start.input_grams(), {}
        for name, like in drawn.items():
            xp: Any = namespace(like=like)
            parts, floor = self._energies(name, grams[name])
            count = min(int(like.shape[0]), int(xp.sum(xp.astype(parts.new > floor, xp.int32))))
            designed = xp.matrix_transpose(parts.directions[:, :count]) / SHORTENED
            rows[name] = xp.astype(designed, like.dtype) if count else xp.zeros_like(like[:1, :])
        return rows

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with the directions that one more task needs.

        Raises:
            BecameError: if a Gram matrix is not square, not finite, or does not fit the basis of its weight.
        """
        spaces = {}
        for name, gram in task.input_grams().items():
            parts, floor = self._energies(name, gram)
            count = min_directions(parts.new, self.epsilon * parts.total, captured=parts.captured, floor=floor)
            spaces[name] = Subspace.of(self._extended(name, parts.directions[:, :count], gram))
        return self._remembering(spaces)

    def _energies(self, name: str, gram: Array) -> tuple[Energies, Array]:
        """Return the energies of C beside the weight's basis, and the energy up to which one is rounding.

        C has the left singular vectors, and as energies the squared singular values, that C C^T has as a Gram matrix.
        """
        xp: Any = namespace(gram=gram)
        c = checked_gram(name, gram, None)
        parts = energies(name, xp.matmul(c, c), self.bases.get(name))
        own = DECOMPOSED * rounding(gram, xp.linalg.trace(c))
        return parts, xp.maximum(own * own, parts.floor)
