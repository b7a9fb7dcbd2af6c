"""Merging models: alpha* and convex combinations (BECAME, Section 3.2 and Algorithm 1)."""

import math
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np

from became_core.arrays import (
    Array,
    Params,
    Reduce,
    Tree,
    aligned_leaves,
    check_values,
    device,
    has_values,
    is_array,
    is_spread,
    label,
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

__all__ = ["combine", "is_statistic", "merge", "optimal_alpha", "scalar"]

# The last parts of the names of what normalisation layers store, in PyTorch and Keras.
STATISTICS = frozenset({"running_mean", "running_var", "moving_mean", "moving_variance"})

# How far from 1 a sum of coefficients may be, which users round as they like.
SUM_TOLERANCE = 1e-3


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
    reduce: Reduce | None = None,
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
        reduce: how numbers are summed over all processes or devices, if the arrays are one's own parts, as within
            ``jax.shard_map``: ``lambda numbers: jax.lax.psum(numbers, "data")``. PyTorch's ``DTensor`` needs none.

    Returns:
        A 0-d array of the inputs' framework and device, of their dtype or float32, whichever is wider; per layer or
        leaf, a tree of such in the structure of theta_gp. 0 (keep the stable model) where the models agree or nothing
        is curved. Merge with ``merge``.

    Arrays that processes share (PyTorch's ``DTensor``) are summed where they are, and at most two reductions of a few
    numbers follow; alpha is then an ordinary array, the same in every process. So it is with JAX's sharded arrays under
    ``jax.jit``.

    State dicts can be given as they are, because leaves that no optimiser moves have no part in alpha: those that hold
    integers or booleans in both models, and the statistics of normalisation layers, which are known by their names
    ``running_mean``, ``running_var``, ``moving_mean`` and ``moving_variance``. The Fisher matrices, the gradient and
    the mean may have them or not. Per layer such a leaf has its layer's coefficient, and per leaf its coefficient is 0.

    Raises:
        BecameError: if structures, shapes, frameworks or devices differ, a Fisher value is negative, an array is sparse
            or masked, or an entry is not finite.

    Examples:
        >>> import numpy as np
        >>> theta_gp, theta_hat = {"w": np.zeros(2)}, {"w": np.ones(2)}
        >>> fisher_old, fisher_new = {"w": np.full(2, 3.0)}, {"w": np.full(2, 1.0)}
        >>> float(optimal_alpha(theta_gp, theta_hat, fisher_old, fisher_new))
        0.25
    """
    theta, others = named_leaves(theta_gp), named_leaves(theta_hat)
    left_out = _no_weights(theta, others)
    whole = theta_gp
    if left_out:
        map_leaves(lambda *leaves: leaves[0], theta_gp, theta_hat)  # whose structures must be equal all the same
        theta_gp, theta_hat, fisher_old, fisher_new, gradient, mean = (
            None if tree is None else _without(left_out, tree)
            for tree in (theta_gp, theta_hat, fisher_old, fisher_new, gradient, mean)
        )
    arguments: dict[str, Any] = {
        "theta_gp": theta_gp,
        "theta_hat": theta_hat,
        "fisher_old": fisher_old,
        "fisher_new": fisher_new,
        "gradient": gradient,
        "mean": mean,
        "per": per,
        "reduce": reduce,
    }
    if isinstance(fisher_old, Precision) or isinstance(fisher_new, Precision):
        alphas = layerwise_quadratic(**arguments).minimiser("box" if clip else None)
    else:  # two diagonals couple no two groups
        alphas = segment_minimiser(*separable_terms(**arguments), clip=clip)
    if per == "model":
        return alphas[0]
    position = {group: index for index, group in enumerate(group_names(theta_gp, per))}
    groups = {path: position.get(group_of(path, per)) for path in theta}
    zero = alphas[0] * 0
    return with_leaves(whole, {path: zero if index is None else alphas[index] for path, index in groups.items()})


def is_statistic(path: str) -> bool:
    """Whether a leaf is a statistic of a normalisation layer, by the last part of its name: no gradient moves it.

    Example:
        >>> [is_statistic(path) for path in ("bn1.running_var", "norm.moving_mean", "bn1.weight")]
        [True, True, False]
    """
    return path.rpartition(".")[2] in STATISTICS


def _no_weights(theta_gp: Params, theta_hat: Params) -> set[str]:
    """Return the leaves that are statistics of normalisation layers by their names, or hold no real numbers in both."""
    holds_integers = _integer_test()
    return {
        path
        for path, leaf in theta_gp.items()
        if path in theta_hat and (is_statistic(path) or (holds_integers(leaf) and holds_integers(theta_hat[path])))
    }


def _integer_test() -> Callable[[Any], bool]:
    """Return a function that says whether an array holds integers or booleans.

    It asks a framework once for each dtype, because that takes as long as a small leaf's arithmetic.
    """
    known: dict[Any, bool] = {}

    def holds_integers(leaf: Any) -> bool:
        kind = type(leaf), getattr(leaf, "dtype", None)
        if kind not in known:
            xp = namespace(leaf=leaf) if is_array(leaf) else None
            known[kind] = xp is not None and bool(xp.isdtype(leaf.dtype, ("integral", "bool")))
        return known[kind]

    return holds_integers


def _without(paths: Set[str], tree: Fisher) -> Fisher:
    if isinstance(tree, Precision):
        return tree.restricted(tree.covered().keys() - paths)
    return {path: leaf for path, leaf in named_leaves(tree).items() if path not in paths}


def merge(theta_gp: Tree, theta_hat: Tree, alpha: Array | Tree | float) -> Tree:
    """Return ``(1 - alpha) * theta_gp + alpha * theta_hat``, leaf by leaf, each in its own dtype.

    The two ends are exact: alpha = 0 gives theta_gp and alpha = 1 gives theta_hat; so is every finite weight in which
    the two models agree (another task's head, say), at any alpha. Integers and booleans, such as a batch norm's
    ``num_batches_tracked``, are carried over from the nearer model. Statistics such as ``running_mean`` lie between
    those of the models; they are not those of the merged model, which are estimated from data. A weight that is
    infinite in one of the models becomes infinite or not a number.

    Args:
        theta_gp: the stable weights, an array or a tree of arrays.
        theta_hat: the plastic weights, of the same structure and shapes.
        alpha: a number, a 0-d array of the same framework, or a tree of either in the structure of theta_gp.

    Raises:
        BecameError: if structures, shapes, frameworks or devices differ, an array is sparse or masked, or alpha is not
            finite or has axes.

    Examples:
        >>> import numpy as np
        >>> merge({"w": np.array([0.0, 2.0])}, {"w": np.array([1.0, 2.0])}, 0.25)
        {'w': array([0.25, 2.  ])}
    """
    holds_integers = _integer_test()
    for leaf in aligned_leaves(theta_gp=theta_gp, theta_hat=theta_hat):
        if not all(map(holds_integers, leaf.values())):
            reduction_dtype(namespace(**leaf), **leaf)

    def merged(stable: Array, plastic: Array, number: Any) -> Array:
        number = _number(number, stable)
        if holds_integers(stable) and holds_integers(plastic):
            return _nearer(stable, plastic, number)
        return _between(stable, plastic, number)

    if isinstance(alpha, int | float) or is_array(alpha):
        _check_alpha(alpha)
        return map_leaves(lambda stable, plastic: merged(stable, plastic, alpha), theta_gp, theta_hat)
    for path, number in named_leaves(alpha).items():
        _check_alpha(number, label("alpha", path))
    return map_leaves(merged, theta_gp, theta_hat, alpha)


def _check_alpha(alpha: Any, name: str = "alpha") -> None:
    """Raise an error if a coefficient has axes or is not finite, which is not known under a trace."""
    if isinstance(alpha, int | float):
        if not math.isfinite(alpha):
            raise BecameError(f"{name} is {alpha}; it must be a finite number.")
        return
    xp = namespace(alpha=alpha)
    if len(alpha.shape):
        raise BecameError(
            f"{name} has shape {tuple(alpha.shape)}; give a number or a 0-d array, or a tree of them, one for each "
            "leaf."
        )
    check_values(xp.all(xp.isfinite(alpha)), f"{name} is infinite or not a number; it must be finite.")


def combine(models: Sequence[Tree], coefficients: Array | Sequence[float]) -> Tree:
    """Return ``sum_k coefficients_k * models_k``, leaf by leaf, each in its own dtype; the coefficients sum to 1.

    A finite weight in which all models agree keeps its bits. Integers and booleans are those of the last model.

    Args:
        models: K trees of one structure.
        coefficients: K numbers, or an array [K] of the same framework, whose sum is 1; the first model is given what
            the others leave of 1, to the last bit.

    Raises:
        BecameError: if their numbers differ, the coefficients do not sum to 1, or structures, shapes, frameworks or
            devices differ.

    Examples:
        >>> import numpy as np
        >>> combine([{"w": np.array([value])} for value in (0.0, 1.0, 4.0)], [0.5, 0.25, 0.25])
        {'w': array([1.25])}
    """
    count = len(coefficients) if isinstance(coefficients, Sequence) else int(coefficients.shape[0])
    if not models or count != len(models):
        raise BecameError(f"there are {len(models)} models and {count} coefficients; give one coefficient a model.")
    holds_integers = _integer_test()
    for leaf in aligned_leaves(**{f"model {index}": model for index, model in enumerate(models)}):
        if not all(map(holds_integers, leaf.values())):
            reduction_dtype(namespace(**leaf), **leaf)
    numbers = [coefficients[index] for index in range(count)]
    _check_sum(numbers)
    weights = numbers[1:]

    def combined(*leaves: Array) -> Array:
        return leaves[-1] if all(map(holds_integers, leaves)) else _combination(leaves, weights)

    return map_leaves(combined, *models)


def _check_sum(coefficients: Sequence[Any]) -> None:
    """Raise an error if coefficients do not sum to 1, but for rounding; under a trace nothing is known of them."""
    total = sum(coefficients[1:], start=coefficients[0])
    if isinstance(total, int | float | np.generic):
        wrong = not abs(float(total) - 1) <= SUM_TOLERANCE
    else:
        xp = namespace(coefficients=total)
        tolerance = max(SUM_TOLERANCE, len(coefficients) * float(xp.finfo(total.dtype).eps))
        wrong = has_values(total) and not bool(xp.abs(total - 1) <= tolerance)
    if wrong:
        raise BecameError(f"the coefficients sum to {float(total):.6g}; they must sum to 1.")


def _combination(leaves: Sequence[Array], weights: Sequence[Any]) -> Array:
    first = leaves[0]
    xp = namespace(model=first)
    dtype = reduction_dtype(xp, model=first)
    origin = xp.astype(first, dtype, copy=False)
    total = origin
    for leaf, weight in zip(leaves[1:], weights, strict=True):
        total = total + scalar(weight, dtype, first) * (xp.astype(leaf, dtype, copy=False) - origin)
    return xp.astype(total, first.dtype, copy=False)


def _nearer(stable: Array, plastic: Array, alpha: Any) -> Array:
    is_stable = alpha < 0.5
    if isinstance(is_stable, bool):
        return stable if is_stable else plastic
    return namespace(stable=stable).where(is_stable, stable, plastic)


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


def _number(number: Any, like: Array) -> Any:
    """Return a number of NumPy as Python has it, unless the other array is NumPy's too."""
    is_numbers = isinstance(number, np.generic) or (isinstance(number, np.ndarray) and number.ndim == 0)
    return number.item() if is_numbers and not isinstance(like, np.ndarray | np.generic) else number


def scalar(number: Any, dtype: Any, like: Array) -> Array:
    """Return a number, or a sequence of numbers, as an array of this dtype on another one's device."""
    xp, number = namespace(like=like), _number(number, like)
    if isinstance(number, int | float | Sequence):
        # A scalar cannot be spread as an array is; without a device JAX takes it to where it is needed.
        return xp.asarray(number, dtype=dtype, device=None if is_spread(like) else device(like))
    return xp.astype(number, dtype, copy=False)
