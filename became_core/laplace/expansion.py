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

from collections.abc import Sequence

from became_core.arrays import (
    Array,
    Params,
    Tree,
    aligned_leaves,
    device,
    difference,
    group_sums,
    inner_products,
    named_leaves,
    namespace,
    reduction_dtype,
)
from became_core.errors import BecameError
from became_core.laplace.groups import Per, group_directions
from became_core.laplace.precision import Diagonal, Precision
from became_core.laplace.quadratic import Quadratic
from became_core.laplace.separable import given_trees, separable_terms

__all__ = ["Fisher", "layerwise_quadratic", "path_quadratic", "subspace_quadratic"]

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
        trees = given_trees(theta_gp=theta_gp, theta_hat=theta_hat, gradient=gradient, mean=mean)
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
    return group_sums([parts])[0]
