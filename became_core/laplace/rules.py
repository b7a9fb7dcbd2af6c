"""Rules that turn what was measured at the end of stage 2 into the quadratic whose minimiser is alpha*.

Each rule is a value, so that an estimator can be chosen; all share one interface, ``quadratic(...)``.
Convention: curvatures of the new task are means over its samples, like those summed in the posterior.
"""

from dataclasses import dataclass
from typing import Protocol

from became_core.arrays import Array, Params, namespace
from became_core.laplace.posterior import LaplacePosterior
from became_core.laplace.precision import Diagonal
from became_core.laplace.quadratic import Quadratic

__all__ = ["Calibrated", "MergeRule", "NewTask", "Published"]


class NewTask(Protocol):
    """The new task's loss near theta_hat; a rule asks for what it needs and nothing else is computed."""

    def diagonal(self) -> Diagonal:
        """Return the diagonal Fisher information at theta_hat."""

    def along(self, delta: Params) -> tuple[Array, Array]:
        """Return (g.delta, delta.GGN.delta) at theta_hat, with no approximation of either."""


class MergeRule(Protocol):
    """How to estimate the cumulative loss between theta_gp and theta_hat."""

    def quadratic(
        self, theta_gp: Params, theta_hat: Params, posterior: LaplacePosterior, new_task: NewTask
    ) -> Quadratic:
        """Return the quadratic along the segment."""


@dataclass(frozen=True)
class Published:
    """The paper's closed form: two diagonals, stage 2 converged (g = 0), and the posterior's mean at theta_gp."""

    def quadratic(
        self, theta_gp: Params, theta_hat: Params, posterior: LaplacePosterior, new_task: NewTask
    ) -> Quadratic:
        """Return the quadratic with slope -delta.F_new.delta and curvature delta.(F_old + F_new).delta."""
        delta = difference(theta_hat, theta_gp)
        new = new_task.diagonal().inner(delta, delta)
        return Quadratic(slope=-new, curvature=new + posterior.precision.inner(delta, delta))


@dataclass(frozen=True)
class Calibrated:
    """The full formula, with the new task's directional curvature and gradient exact and the old side calibrated.

    A diagonal underestimates the curvature along delta, two- to eight-fold on convolutional networks. In a ratio of
    two diagonals that cancels; beside an exact curvature it does not. So the old diagonal is scaled by kappa, the
    exact over the diagonal curvature of the new task along this very delta: the one place where both are known.
    """

    def quadratic(
        self, theta_gp: Params, theta_hat: Params, posterior: LaplacePosterior, new_task: NewTask
    ) -> Quadratic:
        """Return new + kappa * old, the new part having slope g.delta - delta.GGN.delta at theta_gp."""
        delta = difference(theta_hat, theta_gp)
        slope_at_hat, exact = new_task.along(delta)
        diagonal = new_task.diagonal().inner(delta, delta)
        xp = namespace(exact=exact, diagonal=diagonal)
        one = xp.ones_like(diagonal)
        kappa = xp.where(diagonal > 0, exact / xp.where(diagonal > 0, diagonal, one), one)
        new = Quadratic(slope=slope_at_hat - exact, curvature=exact)
        old: Quadratic = _along(posterior.quadratic(theta_gp, [delta])) * kappa
        return new + old


def _along(quadratic: Quadratic) -> Quadratic:
    """A quadratic of one direction, as numbers."""
    return Quadratic(quadratic.slope[0], quadratic.curvature[0, 0])


def difference(left: Params, right: Params) -> Params:
    """Return left - right, name by name."""
    return {name: value - right[name] for name, value in left.items()}
