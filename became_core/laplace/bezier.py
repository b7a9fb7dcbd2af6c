"""A curved merging path: the quadratic Bezier curve between two models, and when it beats the segment.

    theta(t) = (1 - t)^2 theta_gp + 2 t (1 - t) theta_c + t^2 theta_hat

The segment is the curve whose control point is the middle, theta_c = (theta_gp + theta_hat) / 2. Under two diagonal
curvatures the Laplace cumulative loss has its minimum where every weight has an alpha of its own,

    theta_J = (F_old + F_new)^-1 (F_old theta_gp + F_new theta_hat)

It lies on the segment only if F_new / (F_old + F_new) is one number wherever the models differ; otherwise the curve
that passes through it at t = 1/2,

    theta_c = 2 theta_J - (theta_gp + theta_hat) / 2,

beats every point of the segment by ``predicted_advantage``. The control point can be trained on true losses as well
(Garipov 2018). Convention: means over samples, as elsewhere; t in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass

from became_core.arrays import Array, Tree, map_leaves, named_leaves, namespace, pytree
from became_core.errors import BecameError
from became_core.laplace.expansion import path_quadratic
from became_core.laplace.merge import merge
from became_core.laplace.quadratic import segment_minimiser

__all__ = ["BezierPath", "bezier_path", "predicted_advantage", "train_control"]


@pytree
@dataclass(frozen=True)
class BezierPath:
    """A quadratic Bezier curve between two models, trees of one structure."""

    theta_gp: Tree
    control: Tree
    theta_hat: Tree

    def at(self, t: float) -> Tree:
        """Return theta(t)."""

        def point(start: Array, control: Array, end: Array) -> Array:
            return (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end

        return map_leaves(point, self.theta_gp, self.control, self.theta_hat)


def bezier_path(theta_gp: Tree, theta_hat: Tree, fisher_old: Tree, fisher_new: Tree) -> BezierPath:
    """Return the curve that passes at t = 1/2 through the minimum of the Laplace cumulative loss.

    Args:
        theta_gp: the stable weights, an array or a tree of arrays.
        theta_hat: the plastic weights; this and what follows have the same structure and shapes.
        fisher_old: the diagonal precision of the old tasks, whose mean is at theta_gp.
        fisher_new: the diagonal curvature of the new task at theta_hat, in the same unit.

    Raises:
        BecameError: if structures, shapes or frameworks differ, a curvature is negative, or an entry is not finite.
    """
    path_quadratic(theta_gp, theta_hat, fisher_old, fisher_new)  # for its checks
    best = merge(theta_gp, theta_hat, map_leaves(_share, fisher_old, fisher_new))
    control = map_leaves(lambda centre, start, end: 2 * centre - 0.5 * (start + end), best, theta_gp, theta_hat)
    return BezierPath(theta_gp, control, theta_hat)


def predicted_advantage(theta_gp: Tree, theta_hat: Tree, fisher_old: Tree, fisher_new: Tree) -> Array:
    """Return by how much the curve's best point is lower than the segment's, a 0-d array, at least 0 up to rounding.

    Zero exactly where one alpha serves every weight: then the segment is as good.

    Args:
        theta_gp: the stable weights.
        theta_hat: the plastic weights.
        fisher_old: the diagonal precision of the old tasks.
        fisher_new: the diagonal curvature of the new task.
    """
    on_segment = path_quadratic(theta_gp, theta_hat, fisher_old, fisher_new).predicted_gain("box")
    gains = named_leaves(map_leaves(_gain, theta_gp, theta_hat, fisher_old, fisher_new)).values()
    return sum(gains, -on_segment)


def train_control(
    path: BezierPath, gradient: Callable[[Tree], Tree], *, rate: float, steps: int, nodes: int = 3
) -> BezierPath:
    """Return the path with its control point moved downhill on the mean loss over the curve.

    Args:
        path: where to begin.
        gradient: of the loss, at a tree of weights.
        rate: the step's length.
        steps: how many.
        nodes: at how many inner points of the curve the loss is looked at, evenly spaced.

    Raises:
        BecameError: if there is nothing to do.
    """
    if steps < 1 or nodes < 1:
        raise BecameError(f"a control point is trained in {steps} steps at {nodes} nodes; give at least 1 of each.")
    for _ in range(steps):
        for node in range(1, nodes + 1):
            t = node / (nodes + 1)
            pull = 2 * t * (1 - t) * rate / nodes  # d theta(t) / d control = 2 t (1 - t)
            moved = map_leaves(
                lambda control, slope, pull=pull: control - pull * slope, path.control, gradient(path.at(t))
            )
            path = BezierPath(path.theta_gp, moved, path.theta_hat)
    return path


def _share(fisher_old: Array, fisher_new: Array) -> Array:
    """F_new / (F_old + F_new), each weight's own alpha; 0 where nothing is curved."""
    return segment_minimiser(-fisher_new, fisher_old + fisher_new, clip=True)


def _gain(theta_gp: Array, theta_hat: Array, fisher_old: Array, fisher_new: Array) -> Array:
    """A leaf's gain over theta_gp when each weight takes its own alpha: 1/2 sum alpha F_new delta^2."""
    delta = theta_hat - theta_gp
    xp = namespace(delta=delta)
    return 0.5 * xp.sum(_share(fisher_old, fisher_new) * fisher_new * delta * delta)
