"""Trees of arrays: named leaves, and several trees walked side by side.

Convention: a leaf is called by its path, entries joined by dots (``conv1.weight``, ``encoder.0``); a tree that is a
bare array has one leaf with an empty path, and messages then give the tree's own name alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import optree

from became_core.arrays.namespace import Array, namespace
from became_core.errors import BecameError

__all__ = ["Params", "Tree", "aligned_leaves", "map_leaves", "named_leaves"]

# Any nesting of dicts, lists, tuples and registered nodes with arrays at its leaves.
Tree = Any

# The package's own form of parameters: arrays by canonical name (``conv1.weight`` OIHW, ``fc1.weight`` [out, in]).
Params = dict[str, Array]


def named_leaves(tree: Tree) -> dict[str, Array]:
    """Return the leaves of a tree by their dotted paths, in the tree's order.

    Raises:
        BecameError: if two leaves have the same path.
    """
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    named = {".".join(map(str, path)): leaf for path, leaf in zip(paths, leaves, strict=True)}
    if len(named) < len(leaves):
        raise BecameError("two leaves of a tree have the same dotted path, as {'a.b': …} and {'a': {'b': …}} do.")
    return named


def aligned_leaves(**trees: Tree) -> Iterator[dict[str, Array]]:
    """Walk trees of one structure side by side.

    Args:
        trees: the trees by the names a message should call them; the first one is what the others must match.

    Yields:
        For each leaf, the arrays by labels fit for a message, ``"fisher_old 'conv1.weight'"``, in the order given.

    Raises:
        BecameError: naming the first leaf that is missing, superfluous, of another shape or framework, or the tree
            whose containers differ.
    """
    reference_name, *_ = trees
    flat = {name: named_leaves(tree) for name, tree in trees.items()}
    reference = flat[reference_name]
    for name, leaves in flat.items():
        for path in reference:
            if path not in leaves:
                raise BecameError(f"{name} lacks the leaf '{path}' that {reference_name} has; give equal structures.")
        for path in leaves:
            if path not in reference:
                raise BecameError(f"{name} has a leaf '{path}' that {reference_name} lacks; give equal structures.")
    structure = optree.tree_structure(trees[reference_name])
    for name, tree in trees.items():
        if not _matches(structure, tree):
            raise BecameError(f"{name} is nested otherwise than {reference_name}; give equal structures.")
    rows = [{_label(name, path): leaves[path] for name, leaves in flat.items()} for path in reference]
    if rows:
        namespace(**{label: array for row in rows for label, array in row.items()})
    for row in rows:
        _check_shapes(row)
    yield from rows


def _matches(structure: Any, tree: Tree) -> bool:
    """Whether a tree of the right names has the right containers too: {"a": {"b": x}} is not {"a.b": x}."""
    try:
        structure.flatten_up_to(tree)
    except ValueError:
        return False
    return True


def _label(name: str, path: str) -> str:
    return f"{name} '{path}'" if path else name


def _check_shapes(arrays: dict[str, Array]) -> None:
    first_name, first = next(iter(arrays.items()))
    for name, array in arrays.items():
        if tuple(array.shape) != tuple(first.shape):
            raise BecameError(
                f"{name} has shape {tuple(array.shape)} but {first_name} has {tuple(first.shape)}; make them equal."
            )


def map_leaves(function: Callable[..., Array], tree: Tree, *others: Tree) -> Tree:
    """Apply a function leaf by leaf; the result has the first tree's structure."""
    return optree.tree_map(function, tree, *others)
