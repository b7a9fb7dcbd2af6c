"""Low-rank adapters (LoRA; Hu et al., ICLR 2022, arXiv 2106.09685) as a region that a stage is trained in.

For each adapted weight W [d_out, d_in], with rank r and scale s:

    effective       W + s B A       A [r, d_in] and B [d_out, r] are trained, and W stands still
    gradients       dB = s G A^T,   dA = s B^T G     with G the gradient by the effective weight
    begins as       B = 0, so that the effective weights begin as the shared ones

The region is absorbed: when its stage ends, the effective weights become the shared ones. After it, a network has the
size that it had, and curvature, memories and merges are of plain weights. The merge of theta_gp and theta_hat is then
exactly that of their differences to any common W.

Rows of A lie in the input space of W. A projector that protects inputs M projects the rows with which A begins and
every step of A, as it projects updates of W. Then A M = 0, and s B A M = 0 whatever B is: the layer answers old inputs
as before. What differs from Hu 2022: s is a setting by itself, not a setting divided by r.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, pytree, static
from became_core.errors import BecameError
from became_core.projection.base import Region

__all__ = ["LowRankRegion"]

A, B = "@A", "@B"


@pytree
@dataclass(frozen=True)
class LowRankRegion(Region):
    """Low-rank adapters of some weights, which learn in the place of these weights (Hu 2022).

    Attributes:
        scales: what is trained: B [d_out, r] as ``NAME@B``, and A [r, d_in] as ``NAME@A`` if A is trained.
        fixed: each A that is not trained, as ``NAME@A``.
        scale: s, what the product of B and A is multiplied by.

    Raises:
        BecameError: if a weight has no A or no B, or their ranks differ.

    Examples:
        >>> import numpy as np
        >>> factors = {"fc.weight@A": np.array([[1.0, 0.0]]), "fc.weight@B": np.array([[2.0]])}
        >>> LowRankRegion(factors).effective({"fc.weight": np.array([[1.0, 1.0]])})["fc.weight"]
        array([[3., 1.]])
    """

    scales: Params
    fixed: Params = field(default_factory=dict)
    scale: float = static(default=1.0)

    absorbed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check that every weight has both factors, and that they fit."""
        factors = {**self.fixed, **self.scales}
        for key in factors:
            name, _, part = key.rpartition("@")
            if part not in ("A", "B") or name + A not in factors or name + B not in self.scales:
                raise BecameError(f"the adapters have '{key}' without its other factor; give both, NAME@A and NAME@B.")
            ranks = int(factors[name + A].shape[0]), int(factors[name + B].shape[1])
            if ranks[0] != ranks[1]:
                raise BecameError(f"A of '{name}' has rank {ranks[0]}, and B has {ranks[1]}; they must be equal.")

    @classmethod
    def initial(cls, rows: Params, theta: Params, *, scale: float = 1.0, trains_rows: bool = True) -> Self:
        """Return adapters that change nothing yet.

        Args:
            rows: A of each adapted weight, [r, d_in], by the weight's name.
            theta: the weights, of at least these names.
            scale: s.
            trains_rows: whether A is trained; B always is.
        """
        up = {}
        for name, row in rows.items():
            xp: Any = namespace(weight=theta[name])
            flat = xp.reshape(theta[name], (theta[name].shape[0], -1))
            up[name + B] = xp.zeros_like(flat[:, : row.shape[0]])
        down = {name + A: row for name, row in rows.items()}
        return cls(up | down, scale=scale) if trains_rows else cls(up, down, scale=scale)

    @property
    def weights(self) -> frozenset[str]:
        """The names of the adapted weights."""
        return frozenset(key.removesuffix(B) for key in self.scales if key.endswith(B))

    @property
    def projected_as(self) -> Mapping[str, str]:
        """Each A that is trained, by its key, and the weight in whose input space its rows lie."""
        return {key: key.removesuffix(A) for key in self.scales if key.endswith(A)}

    def with_scales(self, scales: Params) -> Self:
        """Return the region with other factors that are trained."""
        return replace(self, scales=scales)

    def effective(self, theta: Params) -> Params:
        """Return all parameters, with W + s B A for each adapted weight that is there."""
        result = dict(theta)
        for name in sorted(self.weights & theta.keys()):
            a, b = self._factors(name, theta[name])
            xp: Any = namespace(weight=theta[name])
            result[name] = theta[name] + xp.reshape(self.scale * xp.matmul(b, a), theta[name].shape)
        return result

    def pull_back(self, gradients: Params, theta: Params) -> Params:
        """Return the gradients by the factors, and those of other weights; none by an adapted weight."""
        result = {name: value for name, value in gradients.items() if name not in self.weights}
        for name in sorted(self.weights & gradients.keys()):
            xp: Any = namespace(gradient=gradients[name])
            g = xp.reshape(gradients[name], (gradients[name].shape[0], -1))
            a, b = self._factors(name, g)
            result[name + B] = self.scale * xp.matmul(g, xp.matrix_transpose(a))
            if name + A in self.scales:
                result[name + A] = self.scale * xp.matmul(xp.matrix_transpose(b), g)
        return result

    def curvature_bounds(self, curvature: Params) -> Params:
        """Return an upper bound of the curvature by each factor, as a diagonal.

        With S the curvature by W, that by a row b_i of B is s^2 A diag(S_i) A^T, and that by a column a_j of A is
        s^2 B^T diag(S_.j) B. A positive semi-definite matrix of r rows is at most r times its own diagonal.
        """
        bounds = {}
        for name in sorted(self.weights & curvature.keys()):
            xp: Any = namespace(curvature=curvature[name])
            s = xp.reshape(curvature[name], (curvature[name].shape[0], -1))
            a, b = self._factors(name, s)
            factor = a.shape[0] * self.scale**2
            bounds[name + B] = factor * xp.matmul(s, xp.matrix_transpose(a * a))
            bounds[name + A] = factor * xp.matmul(xp.matrix_transpose(b * b), s)
        return {key: bounds[key] for key in bounds if key in self.scales}

    def _factors(self, name: str, like: Array) -> tuple[Array, Array]:
        """Return A and B of a weight in the dtype of ``like``."""
        xp: Any = namespace(like=like)
        a = self.scales[name + A] if name + A in self.scales else self.fixed[name + A]
        return xp.astype(a, like.dtype, copy=False), xp.astype(self.scales[name + B], like.dtype, copy=False)
