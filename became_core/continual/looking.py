"""The path report of one merge: the truth along it, beside both sides' losses measured in every way."""

from collections.abc import Callable, Sequence

from became_core.arrays import Params
from became_core.continual.estimates import Approximations, new_sides, old_sides
from became_core.continual.measurement import Measurement
from became_core.continual.record import MergePath, PathPoint
from became_core.laplace import LaplacePosterior, trace_path

__all__ = ["look_along"]


def look_along(
    measurements: Sequence[Measurement],
    posterior: LaplacePosterior,
    approximations: Approximations,
    ends: tuple[Params, Params],
    truth: Callable[[Params], tuple[float, float]],
    alphas: Sequence[float],
) -> MergePath:
    """Return the report; the learner, which is at theta_hat, is left elsewhere.

    Args:
        measurements: of all tasks so far, on their own data, the new one last.
        posterior: of the old tasks.
        approximations: of the old tasks.
        ends: theta_gp and theta_hat.
        truth: cumulative training loss and mean test accuracy at some weights.
        alphas: where the truth is asked for.
    """
    theta_gp, theta_hat = ends
    new = new_sides(measurements[-1], theta_gp)
    old = old_sides(posterior, approximations, measurements[:-1], theta_gp, theta_hat)
    traced = trace_path(truth, theta_gp, theta_hat, alphas)
    return MergePath(
        [PathPoint(alpha, *found) for alpha, found in zip(*traced, strict=True)],
        new={name: (side.slope, side.curvature) for name, side in new.items()},
        old={name: (side.slope, side.curvature) for name, side in old.items()},
    )
