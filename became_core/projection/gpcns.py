"""GPCNS, gradient projection in the common null space (Yang et al., ACM Multimedia 2024).

The paper is "Introducing Common Null Space of Gradients for Gradient Projection Methods in Continual Learning". Of each
weight's gradients G_t [d_out, d_in] after each task, and with singular values sigma rather than their squares:

    gradients  of all tasks so far, stacked: V_t = the leading right singular vectors with sum sigma <= epsilon_t total
    bases      of all tasks so far, side by side, [V_1 ... V_t] = U diag(sigma) W^T: M = the leading columns of U with
               sum sigma <= epsilon_t total, and importances from sigma by SGP's formula
    update     G <- G - G M diag(lambda) M^T

The first task's M is V_1, with importances 1. As published, a direction is kept only if it is within epsilon with all
before it, so a weight with a single gradient direction is protected at epsilon = 1 alone.

What differs: the stacks are kept as Gram matrices, sum G^T G and sum V V^T, both [d_in, d_in] however many tasks
there are; values that are rounding beside the largest count as 0.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, pytree
from became_core.projection.base import FinishedTask
from became_core.projection.energy import checked_gram, rounding, spectrum, wide
from became_core.projection.sgp import ImportanceProjector, importances
from became_core.projection.subspace import Subspace

__all__ = ["GPCNS"]


@pytree
@dataclass(frozen=True)
class GPCNS(ImportanceProjector):
    """Projection out of the common space of old tasks' gradients, by importance (Yang 2024).

    ``ThresholdProjector`` and ``ImportanceProjector`` have the settings.

    Attributes:
        gradients: for each weight, the sum over tasks of the mean of G^T G, [d_in, d_in].
        stacks: for each weight, the sum over tasks of V V^T, [d_in, d_in].
    """

    gradients: Params = field(default_factory=dict, kw_only=True)
    stacks: Params = field(default_factory=dict, kw_only=True)

    beside: ClassVar[tuple[str, ...]] = ("gradients", "stacks")

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task's gradients.

        Raises:
            BecameError: if a Gram matrix is not square, not finite, or does not fit that of the tasks before.
        """
        spaces: dict[str, Subspace] = {}
        gradients: Params = {}
        stacks: Params = {}
        for name, gram in task.gradient_grams().items():
            xp: Any = namespace(gram=gram)
            old = self.gradients.get(name)
            total = checked_gram(name, gram, None if old is None else int(old.shape[0]))
            total = total if old is None else total + wide(old)
            v, _ = _leading(total, self.epsilon, gram)
            stack = xp.matmul(v, xp.matrix_transpose(v))
            if old is None:
                spaces[name] = Subspace.of(xp.astype(v, gram.dtype))
            else:
                stack = stack + wide(self.stacks[name])
                u, sigma = _leading(stack, self.epsilon, gram)
                weights = importances(sigma, self.scale)
                spaces[name] = Subspace.of(xp.astype(u, gram.dtype), xp.astype(weights, gram.dtype))
            gradients[name], stacks[name] = xp.astype(total, gram.dtype), xp.astype(stack, gram.dtype)
        return self._remembering(spaces, gradients=gradients, stacks=stacks)


def _leading(symmetric: Array, share: float, like: Array) -> tuple[Array, Array]:
    """Return the leading vectors [d, k] and singular values [k] of A that sum to at most a share, from A A^T [d, d]."""
    xp: Any = namespace(symmetric=symmetric)
    values, vectors = spectrum(symmetric)
    floor = rounding(like, xp.linalg.trace(symmetric))
    sigma = xp.sqrt(xp.where(values > floor, values, xp.zeros_like(values)))
    reached = xp.cumulative_sum(sigma)
    within = xp.logical_and(sigma > 0, reached <= share * reached[-1])
    count = int(xp.sum(xp.astype(within, xp.int32)))
    return vectors[:, :count], sigma[:count]
