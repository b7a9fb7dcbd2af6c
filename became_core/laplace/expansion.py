"""Second-order expansions along directions: where a merge's quadratic comes from (BECAME, Section 3.2).

A loss expanded at a point, with gradient g and curvature P there, is along theta_0 + sum_k a_k d_k the quadratic

    b_k = g.d_k + (theta_0 - point).P.d_k        C_kl = d_k.P.d_l

The old tasks' Laplace posterior N(mean, P_old^-1) is expanded at its mean, where g = 0; the new task at theta_hat. So
on the segment from theta_gp, with delta = theta_hat - theta_gp, their sum has

    b = g.delta - delta.H_new.delta + (theta_gp - mean).P_old.delta
    C = delta.(P_old + H_new).delta

and with g = 0 and mean = theta_gp its minimiser -b / C is the paper's alpha* = delta.H_new.delta / delta.(P_old +
H_new).delta. Two diagonal curvatures couple no two leaves, so every leaf has a slope and a curvature of its own, and
those of the leaves that share a coefficient are added. That is the common case: each array is read once.

Convention: the unit of the loss (a mean or a sum over samples) is the caller's, and is the same in every term.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Literal

import numpy as np

from became_core.arrays import (
    Array,
    Factors,
    Params,
    Reduce,
    Tree,
    aligned_rows,
    check_values,
    device,
    difference,
    hold,
    label,
    named_leaves,
    namespace,
    reduction_dtype,
    sums_of_products,
)
from became_core.errors import BecameError
from became_core.laplace.quadratic import Quadratic
from became_core.precision import Diagonal, GramRequest, Precision, check_diagonal, gram_matrices

__all__ = [
    "Fisher",
    "Per",
    "group_directions",
    "group_names",
    "group_of",
    "layerwise_quadratic",
    "path_quadratic",
    "separable_terms",
    "subspace_quadratic",
]

# A curvature: a precision of any structure, or the diagonal of one as an array or a tree of arrays.
Fisher = Precision | Tree

# What shares one coefficient of a merge.
Per = Literal["model", "layer", "leaf"]


def path_quadratic(
    theta_gp: Tree,
    theta_hat: Tree,
    fisher_old: Fisher,
    fisher_new: Fisher,
    *,
    gradient: Tree | None = None,
    mean: Tree | None = None,
    reduce: Reduce | None = None,
) -> Quadratic:
    """Return the Laplace cumulative loss on the segment from theta_gp to theta_hat, a quadratic of one direction.

    Args:
        theta_gp: the stable weights (stage 1), an array or a tree of arrays.
        theta_hat: the plastic weights (stage 2), of the same structure and shapes, like all that follows.
        fisher_old: the precision of the old tasks' posterior, of any structure, or its diagonal as a tree of arrays.
        fisher_new: the curvature of the new task at theta_hat, likewise, in the same unit (means over samples, say).
        gradient: the new task's gradient at theta_hat; zero if not given (stage 2 converged).
        mean: the old posterior's mean; theta_gp if not given.
        reduce: how numbers are summed over all processes or devices, if the arrays are one's own parts, as within
            ``jax.shard_map``: ``lambda numbers: jax.lax.psum(numbers, "data")``. PyTorch's ``DTensor`` needs none.

    Raises:
        BecameError: if structures, shapes or frameworks differ, a curvature is negative, or an entry is not finite.

    Example:
        >>> import numpy as np
        >>> stable, plastic, fisher = np.zeros(2), np.ones(2), np.asarray([1.0, 3.0])
        >>> quadratic = path_quadratic(stable, plastic, fisher, fisher)
        >>> float(quadratic.slope[0]), float(quadratic.curvature[0, 0])
        (-4.0, 8.0)
    """
    return layerwise_quadratic(
        theta_gp, theta_hat, fisher_old, fisher_new, gradient=gradient, mean=mean, per="model", reduce=reduce
    )


def layerwise_quadratic(
    theta_gp: Tree,
    theta_hat: Tree,
    fisher_old: Fisher,
    fisher_new: Fisher,
    *,
    gradient: Tree | None = None,
    mean: Tree | None = None,
    per: Per = "layer",
    reduce: Reduce | None = None,
) -> Quadratic:
    """Return the Laplace cumulative loss with a coefficient of its own for each layer, or each leaf.

    Args:
        theta_gp: the stable weights; this and all that follows as for ``path_quadratic``.
        theta_hat: the plastic weights.
        fisher_old: the precision of the old tasks' posterior.
        fisher_new: the curvature of the new task.
        gradient: the gradient of the new task.
        mean: the old posterior's mean.
        per: what shares a coefficient; a layer is what stands before a leaf's last dot (``conv1`` of ``conv1.weight``).
        reduce: as for ``path_quadratic``.

    Returns:
        One direction for each of ``group_names``, in that order: delta in its leaves, zero elsewhere.

    Raises:
        BecameError: as ``path_quadratic`` does, and for an unknown kind of group.

    Example:
        >>> import numpy as np
        >>> stable, plastic = {"a.w": np.zeros(2), "b.w": np.zeros(2)}, {"a.w": np.ones(2), "b.w": np.ones(2)}
        >>> layerwise_quadratic(stable, plastic, plastic, plastic).slope.tolist()
        [-2.0, -2.0]
    """
    if not isinstance(fisher_old, Precision) and not isinstance(fisher_new, Precision):
        slope, curvature = separable_terms(
            theta_gp, theta_hat, fisher_old, fisher_new, gradient=gradient, mean=mean, per=per, reduce=reduce
        )
        xp = namespace(slope=slope)
        identity = xp.eye(slope.shape[0], dtype=curvature.dtype, device=device(curvature))
        return Quadratic(slope, xp.expand_dims(curvature, axis=-1) * identity)
    curvatures = {"fisher_old": fisher_old, "fisher_new": fisher_new}
    of_trees = {role: tree for role, tree in curvatures.items() if not isinstance(tree, Precision)}
    trees = _without_none(theta_gp=theta_gp, theta_hat=theta_hat, gradient=gradient, mean=mean, **of_trees)
    rows = aligned_rows(trees)
    for path, row in rows.items():
        labelled = {label(role, path): array for role, array in zip(trees, row, strict=True)}
        reduction_dtype(namespace(**labelled), **labelled)
    leaves = {role: {path: row[index] for path, row in rows.items()} for index, role in enumerate(trees)}
    old, new = (f if isinstance(f, Precision) else Diagonal(named_leaves(f)) for f in (fisher_old, fisher_new))
    delta = difference(leaves["theta_hat"], leaves["theta_gp"])
    directions = group_directions(delta, per)
    from_mean = difference(leaves["theta_gp"], leaves.get("mean", leaves["theta_gp"]))
    from_theta_hat = {path: -value for path, value in delta.items()}
    of_old, of_new = _expansions(
        directions, [(old, None, from_mean), (new, leaves.get("gradient"), from_theta_hat)], reduce
    )
    both = of_old + of_new
    xp = namespace(slope=both.slope)
    finite = xp.logical_and(xp.all(xp.isfinite(both.slope)), xp.all(xp.isfinite(both.curvature)))
    check_values(
        finite, "models, curvatures or gradients have entries that are NaN, infinite, or too large to be summed."
    )
    return both


def subspace_quadratic(
    directions: Sequence[Tree],
    precision: Precision,
    *,
    gradient: Tree | None = None,
    offset: Tree | None = None,
    reduce: Reduce | None = None,
) -> Quadratic:
    """Return a loss known to second order at a point, along K directions from another one.

    Args:
        directions: d_1 to d_K, trees of one structure.
        precision: the loss's curvature P at the point.
        gradient: its gradient there; zero if not given.
        offset: from the point to where the directions begin (theta_0 - point); zero if not given.
        reduce: as for ``path_quadratic``.

    Returns:
        Slope ``g.d_k + offset.P.d_k`` and curvature ``d_k.P.d_l``.

    Raises:
        BecameError: if there are no directions, or structures, shapes or frameworks differ.

    Example:
        >>> import numpy as np
        >>> direction = {"w": np.asarray([1.0, 2.0])}
        >>> subspace_quadratic([direction], Diagonal({"w": np.ones(2)}), gradient=direction).slope.tolist()
        [5.0]
    """
    return _expansions(directions, [(precision, gradient, offset)], reduce)[0]


def _expansions(
    directions: Sequence[Tree], losses: Sequence[tuple[Precision, Tree | None, Tree | None]], reduce: Reduce | None
) -> list[Quadratic]:
    """Return the quadratics of several losses (precision, gradient, offset): one reduction, and one for gradients."""
    if not directions:
        raise BecameError("there are no directions; give at least one.")
    named = [named_leaves(direction) for direction in directions]
    requests = []
    for precision, _, offset in losses:
        requests.append(GramRequest(precision, named))
        if offset is not None:
            requests.append(GramRequest(precision, named, [named_leaves(offset)]))
    matrices, quadratics = iter(gram_matrices(requests, reduce)), []
    for _, gradient, offset in losses:
        curvature = next(matrices)
        xp = namespace(curvature=curvature)
        slope = xp.zeros_like(curvature[:, 0])
        if gradient is not None:
            slope = slope + _inner_products(gradient, directions, reduce)
        if offset is not None:
            slope = slope + next(matrices)[:, 0]
        quadratics.append(Quadratic(slope, curvature))
    return quadratics


def separable_terms(
    theta_gp: Tree,
    theta_hat: Tree,
    fisher_old: Tree,
    fisher_new: Tree,
    *,
    gradient: Tree | None,
    mean: Tree | None,
    per: Per,
    reduce: Reduce | None = None,
) -> tuple[Array, Array]:
    """Return each group's slope and curvature, [groups] both, for curvatures that are diagonals, as trees of arrays.

    Arguments and errors as for ``layerwise_quadratic``. All checks of values wait for one look at the end, because each
    look has to wait for an accelerator.
    """
    trees = _without_none(
        theta_gp=theta_gp,
        theta_hat=theta_hat,
        fisher_old=fisher_old,
        fisher_new=fisher_new,
        gradient=gradient,
        mean=mean,
    )
    rows = aligned_rows(trees)
    if not rows:
        raise BecameError("theta_gp has no arrays; give at least one.")
    _check_dtypes(trees, rows)
    groups: dict[str, list[Sequence[Array]]] = {}
    for path, row in rows.items():
        groups.setdefault(group_of(path, per), []).append(row)
    # The curvatures are third and fourth in a row.
    totals = sums_of_products(_TERMS[tuple(trees)[4:]], list(groups.values()), nonnegative=[2, 3], reduce=reduce)
    old, new, *others = totals.sums
    # What overflows is noticed below, and said in a sentence; NumPy alone would warn of it before.
    with np.errstate(over="ignore", invalid="ignore") if totals.has_values else nullcontext():
        slope, curvature = sum(others, -new), old + new
    xp = namespace(slope=slope)
    if totals.has_values:
        sound = xp.all(xp.isfinite(slope) & xp.isfinite(curvature))
        if not bool(sound if totals.least is None else sound & (totals.least >= 0)):
            raise BecameError(_what_is_wrong(trees, rows))
    return slope, curvature


def _terms(
    row: Sequence[Array], square: Callable[[Array], Array], *, others: tuple[str, ...]
) -> list[tuple[Array, Array]]:
    """Return the factors of delta^2 F_old, delta^2 F_new and, if given, of g delta and (theta_gp - mean) F_old delta.

    Args:
        row: theta_gp, theta_hat, fisher_old, fisher_new, and the others.
        square: squares an array, and may use its memory.
        others: what these are.
    """
    theta_gp, theta_hat, fisher_old, fisher_new, *arrays = row
    delta = theta_hat - theta_gp
    squares = delta * delta if others else square(delta)  # the others need delta as well
    pairs = [(squares, fisher_old), (squares, fisher_new)]
    for role, array in zip(others, arrays, strict=True):
        pairs.append((array if role == "gradient" else (theta_gp - array) * fisher_old, delta))
    return pairs


# The same function objects every time, which JAX compiles once. They are no values of a class of ours with an equality
# of its own: PyTorch 2.11 asks for the hash of such a function before it has its attributes.
_TERMS: dict[tuple[str, ...], Factors] = {
    others: partial(_terms, others=others) for others in ((), ("gradient",), ("mean",), ("gradient", "mean"))
}


def _check_dtypes(trees: dict[str, Tree], rows: dict[str, tuple[Array, ...]]) -> None:
    """Raise a BecameError that names the first array which does not hold real floating-point numbers."""
    checked: set[object] = set()
    for path, row in rows.items():
        if checked.issuperset([array.dtype for array in row]):
            continue
        for role, array in zip(trees, row, strict=True):
            reduction_dtype(namespace(array=array), **{label(role, path): array})
            checked.add(array.dtype)


def _what_is_wrong(trees: dict[str, Tree], rows: dict[str, tuple[Array, ...]]) -> str:
    """Return the message on the first leaf with a negative curvature, or an entry or a sum that is not finite."""
    too_large = "the curvature along {} is too large for its dtype; rescale the curvatures, or give a wider dtype."
    for path, row in rows.items():
        for role, array in zip(trees, row, strict=True):
            name = label(role, path)
            if role.startswith("fisher"):
                check_diagonal(name, array)
            (is_finite,) = hold(lambda xp, values: xp.isfinite(values), [array])
            if not is_finite:
                return f"{name} has entries that are infinite or not a number; every entry must be a finite number."
        sums = sums_of_products(_TERMS[tuple(trees)[4:]], [[row]]).sums
        xp = namespace(sums=sums[0])
        if not bool(xp.all(xp.isfinite(xp.stack(sums)))):
            return too_large.format(label("theta_gp", path))
    return too_large.format("all leaves")


def _without_none(**trees: Tree | None) -> dict[str, Tree]:
    return {role: tree for role, tree in trees.items() if tree is not None}


def _inner_products(gradient: Tree, directions: Sequence[Tree], reduce: Reduce | None) -> Array:
    """Return g.d_k, [K]."""
    groups = []
    for direction in directions:
        trees = {"gradient": gradient, "direction": direction}
        rows = aligned_rows(trees)
        _check_dtypes(trees, rows)
        groups.append(list(rows.values()))
    return sums_of_products(_pair, groups, reduce=reduce).sums[0]


def _pair(row: Sequence[Array], _: Callable[[Array], Array]) -> list[tuple[Array, Array]]:
    left, right = row
    return [(left, right)]


def group_names(tree: Tree, per: Per) -> list[str]:
    """Return what shares a coefficient in a tree, in order: its layers, its leaves, or "" for the whole model.

    Example:
        >>> group_names({"conv1": {"weight": 1.0, "bias": 0.0}, "fc.weight": 1.0}, "layer")
        ['conv1', 'fc']
    """
    return list(dict.fromkeys(group_of(path, per) for path in named_leaves(tree)))


def group_directions(delta: Params, per: Per) -> list[Params]:
    """Return for each of ``group_names`` a direction that is delta in the group's leaves and zero elsewhere."""
    zero = {name: namespace(delta=value).zeros_like(value) for name, value in delta.items()}
    return [
        {name: (delta if group_of(name, per) == group else zero)[name] for name in delta}
        for group in group_names(delta, per)
    ]


def group_of(path: str, per: Per) -> str:
    """Return the group that the leaf of this path belongs to: ``conv1`` for ``conv1.weight`` per layer.

    Raises:
        BecameError: for an unknown kind of group.
    """
    if per == "model":
        return ""
    if per == "layer":
        return path.rpartition(".")[0]
    if per == "leaf":
        return path
    raise BecameError(f"there is no coefficient per '{per}'; choose from model, layer, leaf.")
