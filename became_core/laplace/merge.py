"""Merging two models: alpha* and the convex combination (BECAME, Section 3.2 and Algorithm 1)."""

from typing import Any

from became_core.arrays import Array, Tree, aligned_leaves, device, map_leaves, namespace, reduction_dtype
from became_core.laplace.quadratic import path_quadratic

__all__ = ["merge", "optimal_alpha"]


def optimal_alpha(
    theta_gp: Tree,
    theta_hat: Tree,
    fisher_old: Tree,
    fisher_new: Tree,
    *,
    gradient: Tree | None = None,
    mean: Tree | None = None,
    clip: bool = True,
) -> Array:
    """Return the coefficient that minimises the Laplace cumulative loss on the segment between two models.

    With neither gradient nor mean this is the paper's closed form,
    ``sum(fisher_new * delta**2) / sum((fisher_old + fisher_new) * delta**2)``, delta = theta_hat - theta_gp.

    Args:
        theta_gp: the stable weights (stage 1), an array or a tree of arrays of any one framework.
        theta_hat: the plastic weights (stage 2); this and all that follows have the same structure and shapes.
        fisher_old: the old tasks' diagonal precision, at least 0.
        fisher_new: the new task's diagonal Fisher information at theta_hat, in the unit of ``fisher_old``: both sums,
            or both means over samples, in which case every task counts alike.
        gradient: the gradient of the new task's loss at theta_hat, in the same unit; 0 if not given.
        mean: the mean of the old tasks' posterior; theta_gp if not given.
        clip: minimise over [0, 1], as the paper does.

    Returns:
        A 0-d array of the inputs' framework and device, of their dtype or float32, whichever is wider; 0 (keep the
        stable model) where the models agree or nothing is curved. Merge with :func:`merge`.

    Raises:
        BecameError: if structures, shapes or frameworks differ, or a Fisher value is negative or not a number.
    """
    quadratic = path_quadratic(theta_gp, theta_hat, fisher_old, fisher_new, gradient=gradient, mean=mean)
    return quadratic.minimiser(clip=clip)


def merge(theta_gp: Tree, theta_hat: Tree, alpha: Array | float) -> Tree:
    """Return ``(1 - alpha) * theta_gp + alpha * theta_hat``, leaf by leaf, each in its own dtype.

    The two ends are exact: alpha = 0 gives theta_gp and alpha = 1 gives theta_hat; so is every weight in which the two
    models agree (another task's head, say), at any alpha.

    Args:
        theta_gp: the stable weights, an array or a tree of arrays.
        theta_hat: the plastic weights, of the same structure and shapes.
        alpha: a number, or a 0-d array of the same framework.

    Raises:
        BecameError: if structures, shapes or frameworks differ.
    """
    for leaf in aligned_leaves(theta_gp=theta_gp, theta_hat=theta_hat):
        reduction_dtype(namespace(**leaf), **leaf)
    return map_leaves(lambda stable, plastic: _combine(stable, plastic, alpha), theta_gp, theta_hat)


def _combine(stable: Array, plastic: Array, alpha: Any) -> Array:
    arrays = {"theta_gp": stable, "theta_hat": plastic} | ({} if isinstance(alpha, int | float) else {"alpha": alpha})
    xp = namespace(**arrays)
    dtype = reduction_dtype(xp, **arrays)
    stable_wide, plastic_wide = xp.astype(stable, dtype, copy=False), xp.astype(plastic, dtype, copy=False)
    if isinstance(alpha, int | float):
        alpha = xp.asarray(alpha, dtype=dtype, device=device(stable))
    # A step from the nearer end: (1 - alpha) x + alpha x is not always x in floating point, but x + weight * 0 is.
    near_stable = alpha < 0.5
    nearer = xp.where(near_stable, stable_wide, plastic_wide)
    weight = xp.where(near_stable, alpha, alpha - 1)
    return xp.astype(nearer + weight * (plastic_wide - stable_wide), stable.dtype, copy=False)
