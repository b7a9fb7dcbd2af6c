"""GPCNS, gradient projection in the common null space (Yang et al., ACM Multimedia 2024).

The paper is "Introducing Common Null Space of Gradients for Gradient Projection Methods in Continual Learning". Its
thresholds are on sums of singular values, not of their squares. With G_t [d_out, d_in] the gradients of a weight after
task t:

    gradients  G_1 ... G_t, stacked, have right singular vectors; V_t are the leading ones whose singular values sum to
               at most epsilon_t of the total
    bases      [V_1 ... V_t] = U diag(sigma) W^T, side by side; M are the leading columns of U whose singular values sum
               to at most epsilon_t of the total, and SGP's formula gives their importances from sigma
    update     G <- G - G M diag(lambda) M^T

The first task's M is V_1, with importances 1. As published, a direction is taken only if the sum up to and including it
is at most epsilon_t of the total. A weight with a single gradient direction is therefore protected only at epsilon = 1.

What differs: the memory has Gram matrices instead of stacks, sum G^T G and sum V V^T, both [d_in, d_in] for any number
of tasks. A singular value that is rounding beside the largest one counts as 0.

The gradients differ too. The published code has those that the last training step left behind: of its last batch, which
is smaller than the others, with dropout, through the batch statistics, and, from the second task on, already projected.
Here they are of the samples that a projector remembers a task by, 125 for example, batch by batch, at the weights of
the end, without dropout, not projected, with batch statistics as constants. A projector sees only what a learner can
measure at finished weights, so that merged weights can be remembered as well. The measured effect, as directions after
two tasks of CIFAR-100, by the published gradients and by ours: conv2 218 and 351, conv3 313 and 443, fc1 23 and 157,
fc2 23 and 159. So ours protects more of the wide layers.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, pytree
from became_core.projection.base import FinishedTask
from became_core.projection.sgp import ImportanceProjector, importances
from became_core.projection.subspace import Subspace, checked_gram, rounding, spectrum, wide

__all__ = ["GPCNS"]


@pytree
@dataclass(frozen=True)
class GPCNS(ImportanceProjector):
    """Projection out of the common space of old tasks' gradients, by importance (Yang 2024).

    The settings are those of ``ThresholdProjector`` and ``ImportanceProjector``.

    Attributes:
        gradients: for each weight, the sum over tasks of the mean of G^T G, [d_in, d_in].
        stacks: for each weight, the sum over tasks of V V^T, [d_in, d_in].

    Examples:
        >>> import numpy as np
        >>> class Task:
        ...     def gradient_grams(self):
        ...         return {"fc.weight": np.diag([4.0, 1.0, 0.0])}
        >>> memory = GPCNS().remember(Task())
        >>> memory.project({"fc.weight": np.ones((1, 3))})["fc.weight"].round(3)
        array([[0., 1., 1.]])
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
    """Return the leading left singular vectors [d, k] and singular values [k] of a matrix A.

    k is the largest number whose singular values together are at most a share of the sum of all singular values.

    Args:
        symmetric: A A^T, [d, d].
        share: in (0, 1].
        like: an array of the dtype in which A A^T was summed.
    """
    xp: Any = namespace(symmetric=symmetric)
    values, vectors = spectrum(symmetric)
    floor = rounding(like, xp.linalg.trace(symmetric))
    sigma = xp.sqrt(xp.where(values > floor, values, xp.zeros_like(values)))
    reached = xp.cumulative_sum(sigma)
    within = xp.logical_and(sigma > 0, reached <= share * reached[-1])
    count = int(xp.sum(xp.astype(within, xp.int32)))
    return vectors[:, :count], sigma[:count]
