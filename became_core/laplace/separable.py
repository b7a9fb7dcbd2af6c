"""The Laplace cumulative loss between two models, leaf by leaf, where both curvatures are diagonals: the common case.

Two diagonals couple no two leaves, so each leaf has a slope b and a curvature C of its own, along its part of delta
(``expansion`` has the formulas), and those of what shares a coefficient are summed. Each leaf is read once.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np

from became_core.arrays import (
    Arithmetic,
    Array,
    Scratch,
    Tree,
    Workspace,
    aligned_leaves,
    group_sums,
    have_values,
    inner_products,
    named_leaves,
    namespace,
    reduction_dtype,
    stacked,
)
from became_core.errors import BecameError
from became_core.laplace.groups import Per, group_of
from became_core.laplace.precision import check_diagonal

__all__ = ["given_trees", "separable_terms"]


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

    Arguments as for ``expansion.layerwise_quadratic``.
    """
    trees = given_trees(
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
    concrete = all(have_values([array for _, array in leaf.values()]) for leaf in leaves)
    with _quietly() if concrete else nullcontext():
        for path, leaf in zip(named_leaves(trees["theta_gp"]), leaves, strict=True):
            group = group_of(path, per)
            slope, curvature = _leaf_terms(leaf, workspace, lowest)
            slopes.setdefault(group, []).append(slope)
            curvatures.setdefault(group, []).append(curvature)
        slope, curvature = group_sums(slopes.values()), group_sums(curvatures.values())
        # Once for all leaves: an accelerator would be waited for each time.
        if concrete and not _sound(slope, curvature, lowest):
            raise BecameError(next(filter(None, map(_offence, leaves)), _OVERFLOW.format("all leaves")))
    return slope, curvature


def _quietly() -> np.errstate:
    """What overflows or is no number is found in the sums, and said in a sentence; NumPy alone would warn before."""
    return np.errstate(over="ignore", invalid="ignore")


def given_trees(**trees: Tree | None) -> dict[str, Tree]:
    """Return the trees that there are, by their roles."""
    return {role: tree for role, tree in trees.items() if tree is not None}


def _sound(slope: Array, curvature: Array, lowest: Sequence[Array]) -> bool:
    """Whether slopes and curvatures are finite, and the least entries of the diagonals not negative."""
    xp = namespace(slope=slope, curvature=curvature)
    sound = [xp.all(xp.isfinite(slope)), xp.all(xp.isfinite(curvature))]
    sound += [xp.all(stacked(lowest) >= 0)] if lowest else []
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
