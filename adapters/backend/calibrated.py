"""The old tasks' curvature in a loop of the user's own, calibrated as in a run of ours.

A diagonal misses how weights act together, and Fisher information vanishes where samples are fitted; by how much is
kappa, a task's exact curvature over its diagonal along the movement of another task
(``became_core/continual/calibration.py`` has the formula and the reasons). A run of ours knows every movement. A loop
of the user's own may begin with a model that was trained elsewhere, and then no movement is known before the first
merge. So what is known is kept here, and changes at each step of the method:

| step | |
| --- | --- |
| the first data are remembered | their movement is from where their training began, if that is known |
| a merge, with a movement known for the first time | all old curvature takes the kappa of the new data at theta_gp |
| a merge before that | kappa is measured along the new movement itself, for this merge alone: ``Secant()`` |
| new data are remembered, after such a merge | their curvature takes their own kappa along the movement before theirs |

Convention: a movement is a direction, by parameter, so that its length and its dtype hardly matter. Kappa has no unit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from became_core import Diagonal, LaplacePosterior, Secant
from became_core.arrays import Array, Factors, Params, namespace, pytree, static, sums_of_products
from became_core.continual.calibration import calibration
from became_core.laplace import LocalLoss

__all__ = ["Calibration", "movement"]


def movement(begin: Params, end: Params) -> Params | None:
    """Return by how much weights have moved; None if they have not, so that nothing is known of a movement.

    Args:
        begin: the weights before; those that are no parameters now, or had another shape or place, are left out.
        end: the weights after.
    """
    moved = {name: end[name] - value for name, value in begin.items() if name in end and _is_alike(value, end[name])}
    if not moved:
        return None
    squares = sums_of_products(_SQUARE, [[(value,) for value in moved.values()]]).sums[0]
    return moved if float(squares[0]) > 0 else None


# One function for all calls, as JAX compiles it.
_SQUARE: Factors = lambda row, square: [(row[0], row[0])]  # noqa: E731


def _is_alike(value: Array, other: Array) -> bool:
    """Whether two arrays can be subtracted: a tensor that several processes share is of another class than a whole."""
    return type(value) is type(other) and value.shape == other.shape


@pytree
@dataclass(frozen=True)
class Calibration:
    """What is known of how the old tasks' curvature is to be calibrated; a tree for JAX.

    Attributes:
        before: the movement of the data that were remembered last; None if it is not known.
        since: the movement of the last merge, whose data are not remembered yet; None if there is none.
        is_done: whether the old tasks' curvature is calibrated.
    """

    before: Params | None = None
    since: Params | None = None
    is_done: bool = static(default=False)

    @property
    def estimator(self) -> Secant:
        """How a merge takes the old side: as it stands if it is calibrated, or else calibrated for this merge alone."""
        return Secant(calibrates=not self.is_done)

    @property
    def awaits_merge(self) -> bool:
        """Whether the next merge calibrates the old tasks' curvature."""
        return self.before is not None and not self.is_done

    def begun(self, posterior: LaplacePosterior, new: LocalLoss) -> tuple["Calibration", LaplacePosterior]:
        """Return this and the old tasks' loss, whose curvature takes the kappa of the new data if the merge is awaited.

        Args:
            posterior: the old tasks' loss.
            new: the new data's loss at theta_gp.
        """
        if not self.awaits_merge:
            return self, posterior
        scaled = posterior.precision * self._kappa(new, new.diagonal())
        return replace(self, is_done=True), replace(posterior, precision=scaled)

    def fisher(self, fisher: Params, new: LocalLoss) -> Params:
        """Return the Fisher information of new data times their kappa, if the old tasks' curvature is calibrated.

        Args:
            fisher: at the merged weights.
            new: their loss there.
        """
        if self.before is None or not self.is_done:
            return fisher
        kappa = self._kappa(new, Diagonal(fisher))
        return {name: kappa * value for name, value in fisher.items()}

    def remembered(self) -> "Calibration":
        """Return this once the data of the last merge are remembered: later ones are measured along their movement."""
        return Calibration(self.before if self.since is None else self.since, None, self.is_done)

    def _kappa(self, new: LocalLoss, diagonal: Diagonal) -> float:
        assert self.before is not None
        return calibration(new, diagonal, _along(self.before, new.mean))


def _along(direction: Params, theta: Params) -> Params:
    """Return a direction by the parameters of a model of today: it does not move those that are new."""
    return {name: _or_zeros(direction, name, value) for name, value in theta.items()}


def _or_zeros(direction: Mapping[str, Array], name: str, value: Array) -> Array:
    return direction[name] if name in direction else namespace(value=value).zeros_like(value)
