"""Second-order expansions along directions: where a merge's quadratic comes from (BECAME, Section 3.2).

A loss expanded at a point, with gradient g and curvature P there, is along theta_0 + sum_k a_k d_k the quadratic

    b_k = g.d_k + (theta_0 - point).P.d_k        C_kl = d_k.P.d_l

The old tasks' Laplace posterior N(mean, P_old^-1) is expanded at its mean, where g = 0; the new task at theta_hat. So
on the segment from theta_gp, with delta = theta_hat - theta_gp, their sum has

    b = g.delta - delta.H_new.delta + (theta_gp - mean).P_old.delta
    C = delta.(P_old + H_new).delta

and with g = 0 and mean = theta_gp its minimiser -b / C is the paper's alpha* = delta.H_new.delta / delta.(P_old +
H_new).delta.

Convention: the unit of the loss (a mean or a sum over samples) is the caller's, and is the same in every term.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import accumulate

import numpy as np

from became_core.arrays import (
    Arithmetic,
    Array,
    Params,
    Scratch,
    Tree,
    Workspace,
    aligned_leaves,
    device,
    difference,
    have_values,
    inner_products,
    named_leaves,
    namespace,
    reduction_dtype,
    staged_sum,
)
from became_core.errors import BecameError
from became_core.laplace.groups import Per, group_directions, group_of
from became_core.laplace.precision import Diagonal, Precision, check_diagonal
from became_core.laplace.quadratic import Quadratic

__all__ = [
    "Fisher",
    "layerwise_quadratic",
    "path_quadratic",
    "separable_terms",
    "subspace_quadratic",
]

# A curvature: a precision of any structure, or the diagonal of one as an array or a tree of arrays.
Fisher = Precision | Tree


def path_quadratic(
    theta_gp: Tree,
    theta_hat: Tree,
    fisher_old: Fisher,
    fisher_new: Fisher,
    *,
    gradient: Tree | None = None,
    mean: Tree | None = None,
) -> Quadratic:
    """Return the Laplace cumulative loss on the segment from theta_gp to theta_hat, a quadratic of one direction.

    Args:
        theta_gp: the stable weights (stage 1), an array or a tree of arrays.
        theta_hat: the plastic weights (stage 2), of the same structure and shapes, like all that follows.
        fisher_old: the precision of the old tasks' posterior, of any structure, or its diagonal as a tree of arrays.
        fisher_new: the curvature of the new task at theta_hat, likewise, in the same unit (means over samples, say).
        gradient: the new task's gradient at theta_hat; zero if not given (stage 2 converged).
        mean: the old posterior's mean; theta_gp if not given.

    Raises:
        BecameError: if structures, shapes or frameworks differ, a curvature is negative, or an entry is not finite.
    """
    return layerwise_quadratic(theta_gp, theta_hat, fisher_old, fisher_new, gradient=gradient, mean=mean, per="model")


def layerwise_quadratic(
    theta_gp: Tree,
    theta_hat: Tree,
    fisher_old: Fisher,
    fisher_new: Fisher,
    *,
    gradient: Tree | None = None,
    mean: Tree | None = None,
    per: Per = "layer",
) -> Quadratic:
    """Return the Laplace cumulative loss with a coefficient of its own for each layer, or each leaf.

    Args:
        theta_gp: the stable weights; this and all that follows as for ``path_quadratic``.
        theta_hat: the plastic weights.
        fisher_old: the precision of the old tasks' posterior.
        fisher_new: the curvature of the new task.
        gradient: the new task's gradient at theta_hat.
        mean: the old posterior's mean.
        per: what shares a coefficient; a layer is what stands before a leaf's last dot (``conv1`` of ``conv1.weight``).

    Returns:
        One direction for each of ``group_names``, in that order: delta in its leaves, zero elsewhere.
    """
    if isinstance(fisher_old, Precision) or isinstance(fisher_new, Precision):
        trees = _given(theta_gp=theta_gp, theta_hat=theta_hat, gradient=gradient, mean=mean)
        named = {role: _checked_leaves(trees, role) for role in trees}
        return _by_structure(named, _as_precision(fisher_old), _as_precision(fisher_new), per)
    slope, curvature = separable_terms(
        theta_gp, theta_hat, fisher_old, fisher_new, gradient=gradient, mean=mean, per=per
    )
    xp = namespace(slope=slope)
    identity = xp.eye(slope.shape[0], dtype=curvature.dtype, device=device(curvature))
    return Quadratic(slope, xp.expand_dims(curvature, axis=-1) * identity)


def subspace_quadratic(
    directions: Sequence[Tree],
    precision: Precision,
    *,
    gradient: Tree | None = None,
    offset: Tree | None = None,
) -> Quadratic:
    """Return a loss known to second order at a point, along K directions from another one.

    Args:
        directions: d_1 … d_K, trees of one structure.
        precision: the loss's curvature P at the point.
        gradient: its gradient there; zero if not given.
        offset: from the point to where the directions begin (theta_0 - point); zero if not given.

    Returns:
        Slope ``g.d_k + offset.P.d_k`` and curvature ``d_k.P.d_l``.

    Raises:
        BecameError: if there are no directions, or structures, shapes or frameworks differ.
    """
    if not directions:
        raise BecameError("there are no directions; give at least one.")
    named = [named_leaves(direction) for direction in directions]
    curvature = precision.gram(named)
    xp = namespace(curvature=curvature)
    slope = xp.zeros_like(curvature[:, 0])
    if gradient is not None:
        slope = slope + xp.stack([_dot(gradient=gradient, direction=direction) for direction in directions])
    if offset is not None:
        slope = slope + precision.gram(named, [named_leaves(offset)])[:, 0]
    return Quadratic(slope, curvature)


def separable_terms(
    theta_gp: Tree,
    theta_hat: Tree,
    fisher_old: Tree,
    fisher_new: Tree,
    *,
    gradient: Tree | None,
    mean: Tree | None,
    per: Per,
) -> tuple[Array, Array]:
    """Return each group's slope and curvature, [groups] both, for curvatures that are diagonals, as trees of arrays.

    The common case, leaf by leaf: two diagonals couple no two leaves. Arguments as for ``layerwise_quadratic``.
    """
    trees = _given(
        theta_gp=theta_gp,
        theta_hat=theta_hat,
        fisher_old=fisher_old,
        fisher_new=fisher_new,
        gradient=gradient,
        mean=mean,
    )
    workspace = Workspace()
    leaves = [dict(zip(trees, leaf.items(), strict=True)) for leaf in aligned_leaves(**trees)]
    if not leaves:
        raise BecameError("theta_gp has no arrays; give at least one.")
    slopes: dict[str, list[Array]] = {}
    curvatures: dict[str, list[Array]] = {}
    lowest: list[Array] = []
    for path, leaf in zip(named_leaves(trees["theta_gp"]), leaves, strict=True):
        group = group_of(path, per)
        slope, curvature = _leaf_terms(leaf, workspace, lowest)
        slopes.setdefault(group, []).append(slope)
        curvatures.setdefault(group, []).append(curvature)
    slope, curvature = _joined(slopes.values()), _joined(curvatures.values())
    # Once for all leaves: an accelerator would be waited for each time.
    if have_values((slope, curvature)) and not _sound(slope, curvature, lowest):
        raise BecameError(next(filter(None, map(_offence, leaves)), _OVERFLOW.format("all leaves")))
    return slope, curvature


def _given(**trees: Tree | None) -> dict[str, Tree]:
    return {role: tree for role, tree in trees.items() if tree is not None}


def _joined(groups: Iterable[Sequence[Array]]) -> Array:
    """The sum of each group's 0-d arrays, [groups], in their promoted type."""
    groups = list(groups)
    sizes = [len(group) for group in groups]
    every = _stacked([part for group in groups for part in group])
    ends = list(accumulate(sizes))
    xp = namespace(every=every)
    return xp.stack([staged_sum(every[end - size : end]) for size, end in zip(sizes, ends, strict=True)])


def _stacked(parts: Sequence[Array]) -> Array:
    """0-d arrays side by side, in their promoted type."""
    xp = namespace(**{f"part {index}": part for index, part in enumerate(parts)})
    first = parts[0].dtype
    if any(part.dtype != first for part in parts):
        dtype = xp.result_type(*(part.dtype for part in parts))
        parts = [xp.astype(part, dtype, copy=False) for part in parts]
    return xp.stack(parts)


def _sound(slope: Array, curvature: Array, lowest: Sequence[Array]) -> bool:
    """Whether slopes and curvatures are finite, and the least entries of the diagonals not negative."""
    xp = namespace(slope=slope, curvature=curvature)
    sound = [xp.all(xp.isfinite(slope)), xp.all(xp.isfinite(curvature))]
    sound += [xp.all(_stacked(lowest) >= 0)] if lowest else []
    return bool(xp.all(xp.stack(sound)))


def _leaf_terms(leaf: dict[str, tuple[str, Array]], workspace: Workspace, lowest: list[Array]) -> tuple[Array, Array]:
    """Return slope and curvature along one leaf's delta; ``leaf`` gives label and array by role.

    Where values exist, the curvatures' least entries are added to ``lowest``, in one walk with the sums: memory is read
    once.
    """
    arrays = dict(leaf.values())
    xp = namespace(**arrays)
    dtype = reduction_dtype(xp, **arrays)

    def factors(arithmetic: Arithmetic, pieces: Sequence[Array]) -> list[tuple[Array, Array]]:
        wide = [piece if piece.dtype == dtype else xp.astype(piece, dtype) for piece in pieces]
        at = dict(zip(leaf, wide, strict=True))
        if "gradient" in at or "mean" in at:
            delta = arithmetic.sub(at["theta_hat"], at["theta_gp"])
            square = arithmetic.mul(delta, delta)
        else:
            square = arithmetic.squared_difference(at["theta_hat"], at["theta_gp"])
        found = [(square, at["fisher_old"]), (square, at["fisher_new"])]
        if "gradient" in at:
            found.append((at["gradient"], delta))
        if "mean" in at:
            offset = arithmetic.sub(at["theta_gp"], at["mean"])
            found.append((arithmetic.mul(offset, at["fisher_old"]), delta))
        return found

    def look(scratch: Scratch, pieces: Sequence[Array]) -> None:
        at = dict(zip(leaf, pieces, strict=True))
        lowest.extend(scratch.least(at[role]) for role in ("fisher_old", "fisher_new") if at[role].shape[0])

    # What overflows or is no number is found in the sums, and said in a sentence; NumPy alone would warn before.
    with np.errstate(over="ignore", invalid="ignore") if have_values(list(arrays.values())) else nullcontext():
        old, new, *more = inner_products(factors, list(arrays.values()), workspace, look)
        return sum(more, -new), old + new


_OVERFLOW = "the curvature along {} is too large for its dtype; rescale the curvatures, or give a wider dtype."


def _offence(leaf: dict[str, tuple[str, Array]]) -> str | None:
    """What is wrong with a leaf: a negative curvature, an entry or a sum that is not finite; None if nothing is."""
    for role, (label, array) in leaf.items():
        xp = namespace(array=array)
        if role.startswith("fisher"):
            check_diagonal(label, array)
        if not bool(xp.all(xp.isfinite(array))):
            return f"{label} has entries that are infinite or not a number; every entry must be a finite number."
    label, _ = leaf["theta_gp"]
    slope, curvature = _leaf_terms(leaf, Workspace(), [])
    xp = namespace(slope=slope)
    return None if bool(xp.isfinite(slope) & xp.isfinite(curvature)) else _OVERFLOW.format(label)


def _by_structure(named: dict[str, Params], old: Precision, new: Precision, per: Per) -> Quadratic:
    """Any structure of the two curvatures: both losses along each group's part of delta."""
    theta_gp, theta_hat = named["theta_gp"], named["theta_hat"]
    delta = difference(theta_hat, theta_gp)
    directions = group_directions(delta, per)
    mean = named.get("mean", theta_gp)
    offset = difference(theta_gp, mean)
    backwards = {name: -value for name, value in delta.items()}
    return subspace_quadratic(directions, old, offset=offset) + subspace_quadratic(
        directions, new, gradient=named.get("gradient"), offset=backwards
    )


def _checked_leaves(trees: dict[str, Tree], role: str) -> Params:
    for leaf in aligned_leaves(**{"theta_gp": trees["theta_gp"], role: trees[role]}):
        reduction_dtype(namespace(**leaf), **leaf)
    return named_leaves(trees[role])


def _as_precision(fisher: Fisher) -> Precision:
    return fisher if isinstance(fisher, Precision) else Diagonal(named_leaves(fisher))


def _dot(**trees: Tree) -> Array:
    """The inner product of two trees."""
    parts = []
    for leaf in aligned_leaves(**trees):
        xp = namespace(**leaf)
        dtype = reduction_dtype(xp, **leaf)
        arrays = [xp.astype(array, dtype, copy=False) for array in leaf.values()]
        parts += inner_products(lambda _, pair: [(pair[0], pair[1])], arrays)
    return _joined([parts])[0]
