"""Calibration across tasks, around a user's own loop: what is kept of one task to calibrate the curvature of the next.

``became_core/continual/calibration.py`` has the formula and its reasons; runs do the same by ``--precision across``.
Here a task is all that is remembered between two times of stable training: what is remembered of it in parts has the
factor of the first part.

Convention: movements are parameters by name. A parameter that was not trained has not moved.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from adapters.backend.merging import TaskLoss
from became_core import BecameError, Diagonal, LaplacePosterior, Secant
from became_core.arrays import Params, difference, hold, pytree, static
from became_core.continual.calibration import calibration
from became_core.laplace import Estimator, PaperClosedForm

__all__ = ["NO_BATCHES", "AcrossTasks", "Calibration", "check_calibration", "estimator_for", "has_moved"]

Calibration = Literal["across"]

NO_BATCHES = "calibration across tasks measures old batches; give them, and no second moments of an optimizer."


@pytree
@dataclass(frozen=True)
class AcrossTasks:
    """What is known of the last task that was remembered, and of one that has been trained since.

    Attributes:
        movement: by how much the last stage of that task moved the weights.
        following: by how much that of a task has which is not remembered yet; None if there is none.
        kappa: what the curvature of the last task was multiplied by; None of the first one, whose curvature takes the
            kappa of the second.
    """

    movement: Params
    following: Params | None = None
    kappa: float | None = static(default=None)

    @classmethod
    def since(cls, begin: Params, end: Params, advice: str) -> "AcrossTasks":
        """Return what is known of the first task, which moved the weights from one tree to another.

        Raises:
            BecameError: if nothing has moved; the advice says what to do.
        """
        if not has_moved(begin, end):
            raise BecameError(
                "calibration across tasks needs to know how training has moved the weights, and none has moved; "
                + advice
            )
        return cls(_movement(begin, end))

    def after_stage(self, begin: Params, end: Params) -> "AcrossTasks":
        """Return what is known once a stage of the next task has moved the weights from one tree to another."""
        return replace(self, following=_movement(begin, end))

    def remembered(
        self, posterior: LaplacePosterior, fisher: Params, task: TaskLoss
    ) -> "tuple[AcrossTasks, LaplacePosterior, Params]":
        """Return what is known once a task is remembered, the posterior of those before, and its calibrated curvature.

        Args:
            posterior: of the tasks before.
            fisher: the diagonal Fisher information of what is remembered, at the weights as they are.
            task: its loss there.
        """
        if self.following is None:  # more of the last task
            kappa = 1.0 if self.kappa is None else self.kappa
            return self, posterior, (Diagonal(fisher) * kappa).values
        kappa = self._kappa_of(task, fisher)
        known = AcrossTasks(self.following, kappa=kappa)
        return known, self._begun(posterior, kappa), (Diagonal(fisher) * kappa).values

    def merged(
        self,
        posterior: LaplacePosterior,
        theta_gp: Params,
        theta_hat: Params,
        at_stable: Callable[[], tuple[TaskLoss, Params]],
    ) -> "tuple[AcrossTasks, LaplacePosterior]":
        """Return what is known at a merge, and the posterior of the tasks before, with which to merge.

        Args:
            posterior: of the tasks before.
            theta_gp: the stable weights.
            theta_hat: the plastic weights.
            at_stable: measures the new task at the stable weights, and its diagonal Fisher information there.
        """
        known = self.after_stage(theta_gp, theta_hat)
        if self.kappa is not None:
            return known, posterior
        kappa = self._kappa_of(*at_stable())
        return replace(known, kappa=kappa), self._begun(posterior, kappa)

    def _kappa_of(self, task: TaskLoss, fisher: Params) -> float:
        """Return the kappa of a task along the movement of the last one, both at the weights of its measurement."""
        movement = {name: self.movement.get(name, value - value) for name, value in task.mean.items()}
        return calibration(task, Diagonal(fisher), movement)

    def _begun(self, posterior: LaplacePosterior, kappa: float) -> LaplacePosterior:
        """Return the posterior of old tasks once the kappa of the next one is known, which the first one takes."""
        return posterior if self.kappa is not None else replace(posterior, precision=posterior.precision * kappa)


def estimator_for(calibration: Calibration | None, estimator: Estimator | None) -> Estimator:
    """Return the estimator of merges: the one that was asked for, or the paper's closed form.

    Raises:
        BecameError: if there is no calibration of this name, or one across tasks with an estimator of its own.
    """
    check_calibration(calibration)
    if calibration is None:
        return PaperClosedForm() if estimator is None else estimator
    if estimator is not None:
        raise BecameError("calibration across tasks has an estimator, Secant(calibrates=False); leave estimator= out.")
    return Secant(calibrates=False)


def check_calibration(calibration: str | None) -> None:
    """Raise a BecameError if there is no calibration of this name."""
    if calibration not in (None, "across"):
        raise BecameError(f"the calibration is '{calibration}'; choose across, or leave it out.")


def has_moved(begin: Params, end: Params) -> bool:
    """Return whether a parameter of the second tree differs from the first one's."""
    return not all(hold(lambda xp, value: value == 0, list(_movement(begin, end).values())))


def _movement(begin: Params, end: Params) -> Params:
    """Return by how much parameters have moved; those that the first tree does not have, by nothing."""
    return difference(end, {name: begin.get(name, value) for name, value in end.items()})
