"""SGP, scaled gradient projection (Saha & Roy, AAAI 2023, arXiv 2302.01386, Algorithm 1).

SGP has the basis M of GPM and an importance lambda_i in [0, 1] for each of its directions; a direction is protected in
proportion to its importance. With sigma_i the singular values of a task along its directions, and s the scale:

    importance  lambda_i = (s + 1) sigma_i / (s sigma_i + max_j sigma_j)
    old         directions have, for a later task, the singular values sigma'_i = sqrt(sum_j (m_i^T u_j)^2 sigma_j^2),
                (u_j, sigma_j) being the singular vectors and values of M M^T R; their new importances are added to
                their old ones, up to 1
    update      G <- G - G M diag(lambda) M^T

What differs: a Gram matrix is enough here as well, because M M^T m_i = m_i and hence
sigma'_i^2 = m_i^T (M M^T R)(M M^T R)^T m_i = m_i^T R R^T m_i. Its scale does not matter, since importances are ratios.
"""

from dataclasses import dataclass
from typing import Any, Self

from became_core.arrays import Array, namespace, pytree
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask
from became_core.projection.layerwise import ThresholdProjector
from became_core.projection.subspace import Subspace, wide
from became_core.registry import setting

__all__ = ["SGP", "ImportanceProjector", "importances"]


@dataclass(frozen=True)
class ImportanceProjector(ThresholdProjector):
    """A projector that protects each direction by its importance.

    Attributes:
        scale: the number s in the formula of importances; the greater it is, the nearer all importances are to 1.

    Raises:
        BecameError: if the scale is not above 0, or the threshold not in its range.
    """

    scale: float = setting(5.0)

    def __post_init__(self) -> None:
        """Check the threshold and the scale."""
        super().__post_init__()
        if not self.scale > 0:
            raise BecameError(f"the {type(self).__name__} scale is {self.scale}; it must be above 0.")


@pytree
@dataclass(frozen=True)
class SGP(ImportanceProjector):
    """Scaled gradient projection: as gpm, with each direction protected by its importance (Saha & Roy 2023).

    The settings are those of ``ThresholdProjector`` and ``ImportanceProjector``.

    Examples:
        >>> import numpy as np
        >>> class Task:
        ...     def input_grams(self):
        ...         return {"fc.weight": np.diag([4.0, 1.0, 0.0])}
        >>> memory = SGP(threshold=0.9).remember(Task())
        >>> memory.project({"fc.weight": np.ones((1, 3))})["fc.weight"].round(3)
        array([[0.   , 0.143, 1.   ]])
    """

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task's directions, and with its importances added to those of old directions.

        Raises:
            BecameError: if a Gram matrix is not square, not finite, or does not fit the basis of its weight.
        """
        return self._remembering({name: self._grown(name, gram) for name, gram in task.input_grams().items()})

    def _grown(self, name: str, gram: Array) -> Subspace:
        xp: Any = namespace(gram=gram)
        if len(gram.shape) == 1:
            sigma = xp.where(self._axes(name, gram), xp.sqrt(wide(gram)), xp.zeros_like(wide(gram)))
            shares = importances(sigma, self.scale)
            if name in self.spaces:
                shares = xp.clip(shares + wide(self.spaces[name].importance), 0.0, 1.0)
            return Subspace.of(xp.astype(shares, gram.dtype))
        parts, count = self._residual(name, gram)
        importance = importances(xp.sqrt(xp.concat([parts.old, parts.new[:count]])), self.scale)
        if name in self.spaces:
            old = wide(self.spaces[name].importance)
            rank = old.shape[0]
            importance = xp.concat([xp.clip(old + importance[:rank], 0.0, 1.0), importance[rank:]])
        return Subspace.of(
            self._extended(name, parts.directions[:, :count], gram), importance=xp.astype(importance, gram.dtype)
        )


def importances(sigma: Array, scale: float) -> Array:
    """Return the importances (s + 1) sigma_i / (s sigma_i + max_j sigma_j), [k]; they are zeros if all sigma_i are 0.

    Args:
        sigma: singular values, [k], at least 0.
        scale: s, above 0.

    Examples:
        >>> import numpy as np
        >>> importances(np.array([3.0, 1.0]), scale=1.0)
        array([1. , 0.5])
    """
    xp: Any = namespace(sigma=sigma)
    if not sigma.shape[0] or not bool(xp.any(sigma > 0)):
        return sigma
    relative = sigma / xp.max(sigma)
    result = (scale + 1.0) * relative / (scale * relative + 1.0)  # exactly 1 for the largest singular value
    # Singular values that are equal differ by rounding once they are computed. An importance of almost 1 is therefore
    # set to 1, so that all of them are protected whole and not only the one that happens to be the largest.
    return xp.where(result > 1.0 - 64.0 * float(xp.finfo(sigma.dtype).eps), xp.ones_like(result), result)
