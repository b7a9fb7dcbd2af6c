"""Merging models: alpha* and convex combinations (BECAME, Section 3.2 and Algorithm 1)."""

from collections.abc import Sequence
from typing import Any

from became_core.arrays import (
    Array,
    Tree,
    aligned_leaves,
    device,
    has_values,
    is_array,
    lerp_of,
    map_leaves,
    named_leaves,
    namespace,
    reduction_dtype,
    with_leaves,
)
from became_core.errors import BecameError
from became_core.laplace.expansion import Fisher, Per, group_names, group_of, layerwise_quadratic, separable_terms
from became_core.laplace.quadratic import segment_minimiser
from became_core.precision import Precision

__all__ = ["combine", "merge", "optimal_alpha", "scalar"]


def optimal_alpha(
    theta_gp: Tree,
    theta_hat: Tree,
    fisher_old: Fisher,
    fisher_new: Fisher,
    *,
    gradient: Tree | None = None,
    mean: Tree | None = None,
    clip: bool = True,
    per: Per = "model",
) -> Array | Tree:
    """Return the coefficient that minimises the Laplace cumulative loss on the segment between two models.

    With neither gradient nor mean this is the paper's closed form,
    ``sum(fisher_new * delta**2) / sum((fisher_old + fisher_new) * delta**2)``, delta = theta_hat - theta_gp.

    Args:
        theta_gp: the stable weights (stage 1), an array or a tree of arrays of any one framework.
        theta_hat: the plastic weights (stage 2); this and all that follows have the same structure and shapes.
        fisher_old: the old tasks' precision: its diagonal as a tree of arrays, at least 0, or a ``Precision``.
        fisher_new: the new task's Fisher information at theta_hat, likewise, in the unit of ``fisher_old``: both sums,
            or both means over samples, in which case every task counts alike.
        gradient: the gradient of the new task's loss at theta_hat, in the same unit; 0 if not given.
        mean: the mean of the old tasks' posterior; theta_gp if not given.
        clip: minimise over [0, 1], as the paper does.
        per: "model" for one coefficient, "layer" or "leaf" for one each, which together are the minimum in the box.

    Returns:
        A 0-d array of the inputs' framework and device, of their dtype or float32, whichever is wider; per layer or
        leaf, a tree of such in the structure of theta_gp. 0 (keep the stable model) where the models agree or nothing
        is curved. Merge with ``merge``.

    Raises:
        BecameError: if structures, shapes or frameworks differ, a Fisher value is negative, or an entry is not finite.
    """
    arguments: dict[str, Any] = {
        "theta_gp": theta_gp,
        "theta_hat": theta_hat,
        "fisher_old": fisher_old,
        "fisher_new": fisher_new,
        "gradient": gradient,
        "mean": mean,
        "per": per,
    }
    if isinstance(fisher_old, Precision) or isinstance(fisher_new, Precision):
        alphas = layerwise_quadratic(**arguments).minimiser("box" if clip else None)
    else:  # two diagonals couple no two groups
        alphas = segment_minimiser(*separable_terms(**arguments), clip=clip)
    if per == "model":
        return alphas[0]
    position = {group: index for index, group in enumerate(group_names(theta_gp, per))}
    return with_leaves(theta_gp, {path: alphas[position[group_of(path, per)]] for path in named_leaves(theta_gp)})


def merge(theta_gp: Tree, theta_hat: Tree, alpha: Array | Tree | float) -> Tree:
    """Return ``(1 - alpha) * theta_gp + alpha * theta_hat``, leaf by leaf, each in its own dtype.

    The two ends are exact: alpha = 0 gives theta_gp and alpha = 1 gives theta_hat; so is every weight in which the two
    models agree (another task's head, say), at any alpha.

    Args:
        theta_gp: the stable weights, an array or a tree of arrays.
        theta_hat: the plastic weights, of the same structure and shapes.
        alpha: a number, a 0-d array of the same framework, or a tree of either in the structure of theta_gp.

    Raises:
        BecameError: if structures, shapes or frameworks differ.
    """
    for leaf in aligned_leaves(theta_gp=theta_gp, theta_hat=theta_hat):
        reduction_dtype(namespace(**leaf), **leaf)
    if isinstance(alpha, int | float) or is_array(alpha):
        return map_leaves(lambda stable, plastic: _between(stable, plastic, alpha), theta_gp, theta_hat)
    return map_leaves(_between, theta_gp, theta_hat, alpha)


def combine(models: Sequence[Tree], coefficients: Array | Sequence[float]) -> Tree:
    """Return ``sum_k coefficients_k * models_k``, leaf by leaf, each in its own dtype; the coefficients sum to 1.

    A weight in which all models agree keeps its bits.

    Args:
        models: K trees of one structure.
        coefficients: K numbers, or an array [K] of the same framework; only their ratio to the first model counts:
            it is given what the others leave of 1.

    Raises:
        BecameError: if their numbers differ, or structures, shapes or frameworks do.
    """
    count = len(coefficients) if isinstance(coefficients, Sequence) else int(coefficients.shape[0])
    if not models or count != len(models):
        raise BecameError(f"there are {len(models)} models and {count} coefficients; give one coefficient a model.")
    for leaf in aligned_leaves(**{f"model {index}": model for index, model in enumerate(models)}):
        reduction_dtype(namespace(**leaf), **leaf)
    weights = [coefficients[index] for index in range(1, count)]
    return map_leaves(lambda *leaves: _combination(leaves, weights), *models)


def _combination(leaves: Sequence[Array], weights: Sequence[Any]) -> Array:
    first = leaves[0]
    xp = namespace(model=first)
    dtype = reduction_dtype(xp, model=first)
    origin = xp.astype(first, dtype, copy=False)
    total = origin
    for leaf, weight in zip(leaves[1:], weights, strict=True):
        total = total + scalar(weight, dtype, first) * (xp.astype(leaf, dtype, copy=False) - origin)
    return xp.astype(total, first.dtype, copy=False)


def _between(stable: Array, plastic: Array, alpha: Any) -> Array:
    arrays = {"theta_gp": stable, "theta_hat": plastic} | ({} if isinstance(alpha, int | float) else {"alpha": alpha})
    xp = namespace(**arrays)
    dtype = reduction_dtype(xp, **arrays)
    stable_wide, plastic_wide = xp.astype(stable, dtype, copy=False), xp.astype(plastic, dtype, copy=False)
    lerp = lerp_of(stable)
    if lerp is not None:
        weight = alpha if isinstance(alpha, int | float) else scalar(alpha, dtype, stable)
        merged = lerp(stable_wide, plastic_wide, weight)
    else:
        merged = _step_between(stable_wide, plastic_wide, scalar(alpha, dtype, stable))
    return xp.astype(merged, stable.dtype, copy=False)


def _step_between(stable: Array, plastic: Array, weight: Array) -> Array:
    """A step from the nearer end: (1 - a) x + a x is not always x in floating point, but x + a * 0 is."""
    xp = namespace(theta_gp=stable, theta_hat=plastic)
    near_stable = weight < 0.5
    if near_stable.ndim == 0 and has_values(near_stable):
        nearer, weight = (stable, weight) if bool(near_stable) else (plastic, weight - 1)
    else:
        nearer = xp.where(near_stable, stable, plastic)
        weight = xp.where(near_stable, weight, weight - 1)
    return nearer + weight * (plastic - stable)


def scalar(number: Any, dtype: Any, like: Array) -> Array:
    """Return a number, or a sequence of numbers, as an array of this dtype on another one's device."""
    xp = namespace(like=like)
    if isinstance(number, int | float | Sequence):
        return xp.asarray(number, dtype=dtype, device=device(like))
    return xp.astype(number, dtype, copy=False)
