"""A user's tree of parameters by dotted paths, in which a variable of nnx is the array that it holds.

``nnx.split`` makes trees of variables, and ``nnx.Optimizer`` gives an optimiser the bare arrays of them. Both have the
same names here: ``fc.kernel``.
"""

import sys
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental.multihost_utils import process_allgather

from became_core.arrays import Params, named_leaves, with_leaves

__all__ = ["here", "leaves_of", "with_leaves_of"]


def here(tree: Any) -> Any:
    """Return a tree whose arrays this process has whole; if processes share some, all of them must call this."""
    return jax.tree.map(_here, tree)


def _here(leaf: Any) -> Any:
    is_shared = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return jnp.asarray(process_allgather(leaf, tiled=True)) if is_shared else leaf


def leaves_of(tree: Any) -> Params:
    """Return the leaves of a tree by their dotted paths, in the tree's order.

    Raises:
        BecameError: if two leaves have the same path.

    Example:
        >>> from flax import nnx
        >>> list(leaves_of(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))))
        ['bias', 'kernel']
    """
    variables = _variables_of(tree)
    return {_own_name(name, variables): leaf for name, leaf in named_leaves(tree).items()}


def with_leaves_of(tree: Any, leaves: Params) -> Any:
    """Return a tree like this one, with other leaves, all of them by dotted path."""
    variables = _variables_of(tree)
    return with_leaves(tree, {name: leaves[_own_name(name, variables)] for name in named_leaves(tree)})


def _own_name(name: str, variables: frozenset[str]) -> str:
    """Return the name of the variable that a leaf is the array of, or the leaf's own."""
    holder = name.rpartition(".")[0]
    return holder if holder in variables else name


def _variables_of(tree: Any) -> frozenset[str]:
    """Return the dotted paths of the variables of nnx in a tree."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return frozenset()
    kinds = nnx.Variable, vars(nnx).get("VariableState", nnx.Variable)  # older releases of flax have both
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, kinds))
    paths = [path for path, node in nodes if isinstance(node, kinds)]
    return frozenset(jax.tree_util.keystr(path, simple=True, separator=".") for path in paths)
