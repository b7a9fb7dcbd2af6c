"""A user's tree of parameters by dotted paths, in which a variable of nnx is the array that it holds.

``nnx.split`` makes trees of variables, and ``nnx.Optimizer`` gives an optimiser the bare arrays of them. Both have the
same names here: ``fc.kernel``.
"""

import sys
from typing import Any

import jax

from became_core.arrays import Params, named_leaves, with_leaves

__all__ = ["leaves_of", "with_leaves_of"]


def leaves_of(tree: Any) -> Params:
    """Return the leaves of a tree by their dotted paths, in the tree's order.

    Raises:
        BecameError: if two leaves have the same path.

    Example:
        >>> from flax import nnx
        >>> list(leaves_of(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))))
        ['bias', 'kernel']
    """
    return named_leaves(_without_variables(tree))


def with_leaves_of(tree: Any, leaves: Params) -> Any:
    """Return a tree like this one, with other leaves, all of them by dotted path."""
    return with_leaves(tree, dict(zip(named_leaves(tree), (leaves[name] for name in leaves_of(tree)), strict=True)))


def _without_variables(tree: Any) -> Any:
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    kinds = nnx.Variable, getattr(nnx, "VariableState", nnx.Variable)  # older releases of flax have both
    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if isinstance(node, kinds) else node,
        tree,
        is_leaf=lambda node: isinstance(node, kinds),
    )
