"""SGP, scaled gradient projection (Saha & Roy, AAAI 2023, arXiv 2302.01386, Algorithm 1).

GPM's basis M, with an importance lambda_i in [0, 1] for each direction: what matters less is protected less. For the
singular values sigma_i of a task along its directions, and s the scale,

    importance  lambda_i = (s + 1) sigma_i / (s sigma_i + max_j sigma_j)
    a later task's singular values on old directions, (u_j, sigma_j) being those of M M^T R:
                sigma'_i = sqrt(sum_j (m_i^T u_j)^2 sigma_j^2)
    old and new importances add, up to 1
    update      G <- G - G M diag(lambda) M^T

What differs: sigma'_i^2 = m_i^T (M M^T R)(M M^T R)^T m_i = m_i^T R R^T m_i, for M M^T m_i = m_i; so a Gram matrix
is enough here as well, and neither its scale nor that of R plays any part.
"""

from dataclasses import dataclass
from typing import Any, Self

from became_core.arrays import Array, namespace, pytree
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask
from became_core.projection.energy import wide
from became_core.projection.layerwise import ThresholdProjector
from became_core.projection.subspace import Subspace
from became_core.registry import setting

__all__ = ["SGP", "ImportanceProjector", "importances"]


@dataclass(frozen=True)
class ImportanceProjector(ThresholdProjector):
    """A projector that protects each direction by its importance.

    Attributes:
        scale: s in the formula of importances; the greater it is, the nearer all importances are to 1.

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
    """Scaled gradient projection: as gpm, each direction held back by its importance (Saha & Roy 2023).

    ``ThresholdProjector`` and ``ImportanceProjector`` have the settings.
    """

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task's directions added, and its importances added to those of old ones.

        Raises:
            BecameError: if a Gram matrix is not square, not finite, or does not fit the basis kept for its weight.
        """
        return self._remembering({name: self._grown(name, gram) for name, gram in task.input_grams().items()})

    def _grown(self, name: str, gram: Array) -> Subspace:
        xp: Any = namespace(gram=gram)
        parts, count = self._residual(name, gram)
        found = importances(xp.sqrt(xp.concat([parts.old, parts.new[:count]])), self.scale)
        if name in self.spaces:
            old = wide(self.spaces[name].importance)
            rank = old.shape[0]
            found = xp.concat([xp.clip(old + found[:rank], 0.0, 1.0), found[rank:]])
        return Subspace.of(
            self._extended(name, parts.directions[:, :count], gram), importance=xp.astype(found, gram.dtype)
        )


def importances(sigma: Array, scale: float) -> Array:
    """Return (s + 1) sigma_i / (s sigma_i + max sigma) for singular values [k]; zeros where all of them are 0."""
    xp: Any = namespace(sigma=sigma)
    if not sigma.shape[0] or not bool(xp.any(sigma > 0)):
        return sigma
    relative = sigma / xp.max(sigma)
    found = (scale + 1.0) * relative / (scale * relative + 1.0)  # exactly 1 for the greatest
    # So that equal values, which differ by rounding, are all protected whole.
    return xp.where(found > 1.0 - 64.0 * float(xp.finfo(sigma.dtype).eps), xp.ones_like(found), found)
