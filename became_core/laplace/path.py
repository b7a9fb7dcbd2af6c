"""The true loss on the segment between two models: what the predicted quadratic is held against."""

from collections.abc import Callable, Sequence

from became_core.arrays import Array, Tree
from became_core.laplace.merge import merge

__all__ = ["trace_path"]


def trace_path(loss: Callable[[Tree], Array], theta_gp: Tree, theta_hat: Tree, alphas: Sequence[float]) -> list[Array]:
    """Return ``loss(merge(theta_gp, theta_hat, alpha))`` for each alpha, in order.

    Args:
        loss: the loss of a tree of weights, of whatever type it returns.
        theta_gp: the weights at alpha = 0.
        theta_hat: the weights at alpha = 1.
        alphas: where to look; a grid over [0, 1], or beyond.
    """
    return [loss(merge(theta_gp, theta_hat, alpha)) for alpha in alphas]
