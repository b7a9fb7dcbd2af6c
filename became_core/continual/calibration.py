"""Calibration of a task's curvature when it is remembered: what its diagonal misses along another task's movement.

A diagonal leaves out how weights act together, and Fisher information of the labels given vanishes where samples are
fitted, faster than the exact curvature does. How much is missed depends on the direction. Along the movement of a
task's own stage 2, in which its gradients agreed, it is several times what is missed along another task's movement. A
merge asks about old tasks along a movement that is never their own. So with d the movement of the task before, each
task's curvature F_t enters the posterior as kappa_t F_t,

    kappa_t = d.GGN_t.d / d.F_t.d,    d = theta_hat_{t-1} - theta_gp_{t-1},

both at the weights at which F_t is measured. The first task is trained once, and moves from the initial weights. It has
no task before it; when the second one is merged, its curvature takes the kappa that the second has at theta_gp.

Convention: kappa is a factor of precisions, without a unit. It is invariant to the length of d.
"""

from collections.abc import Sequence
from typing import Protocol

from became_core.arrays import Params
from became_core.laplace import Precision, Quadratic

__all__ = ["Measured", "calibration"]


class Measured(Protocol):
    """A task that is measured at the present weights."""

    def along(self, directions: Sequence[Params]) -> Quadratic:
        """Return its mean loss along directions from there."""


def calibration(measurement: Measured, curvature: Precision, movement: Params) -> float:
    """Return a task's exact curvature along another task's movement over that of its precision.

    It is 1 if one of the two is not positive: then they say nothing of each other. The exact one is negative only of a
    loss that is no likelihood, whose curvature is a difference of slopes.

    Args:
        measurement: of the task, at the learner's weights.
        curvature: the task's curvature there.
        movement: of the other task, by parameter; of any length.
    """
    known = float(curvature.gram([movement])[0, 0])
    exact = float(measurement.along([movement]).curvature[0, 0]) if known > 0 else 0.0
    return exact / known if exact > 0 else 1.0
