"""Trees of arrays: named leaves, and several trees walked side by side.

A tree is any nesting of dicts, lists, tuples, named tuples, dataclasses, nodes registered with optree and, where JAX is
loaded, with JAX (``flax.struct``, ``FrozenDict``, ``nnx.State``); None is an empty node. A variable of Keras is a leaf,
its value.

Convention: a leaf is called by its path, entries joined by dots (``conv1.weight``, ``encoder.0``); a tree that is a
bare array has one leaf with an empty path, and messages then give the tree's own name alone.
"""

import dataclasses
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optree

from became_core.arrays.frameworks import is_array
from became_core.arrays.namespace import Array, framework_for, namespace, promoted
from became_core.errors import BecameError

__all__ = [
    "Params",
    "Tree",
    "aligned_leaves",
    "aligned_rows",
    "difference",
    "label",
    "map_leaves",
    "named_leaves",
    "size_in_bytes",
    "with_leaves",
]

# Any nesting of containers, as above, with arrays at its leaves.
Tree = Any

# The package's own form of parameters: arrays by canonical name (``conv1.weight`` OIHW, ``fc1.weight`` [out, in]).
Params = dict[str, Array]


class _Node(NamedTuple):
    """A node opened one level: its entries' names, their subtrees, and how to build the like from other subtrees."""

    entries: Sequence[Any]
    children: Sequence[Tree]
    rebuild: Callable[[list[Tree]], Tree]


def _open(node: Tree) -> _Node | None:
    """Return a node opened one level, or None for a leaf."""
    opened = _open_builtin(node)
    if opened is None and not is_array(node):
        opened = _open_registered_with_optree(node) or _open_registered_with_jax(node) or _open_dataclass(node)
    return opened


def _open_builtin(node: Tree) -> _Node | None:
    # In plain Python, which torch.compile can trace.
    kind = type(node)
    if kind is dict or kind is OrderedDict:
        keys = list(node)
        return _Node(keys, list(node.values()), lambda children: kind(zip(keys, children, strict=True)))
    if kind is list or kind is tuple:
        return _Node(range(len(node)), node, kind)
    if isinstance(node, tuple) and hasattr(kind, "_fields"):
        return _Node(kind._fields, node, lambda children: kind(*children))
    if node is None:
        return _Node((), (), lambda children: None)
    return None


def _open_registered_with_optree(node: Tree) -> _Node | None:
    # Asked first: the error of an unregistered type would print the node, and so wait for an accelerator's values.
    if optree.tree_is_leaf(node):
        return None
    children, metadata, entries, unflatten = optree.tree_flatten_one_level(node)
    return _Node(entries, children, lambda children: unflatten(metadata, children))


def _open_registered_with_jax(node: Tree) -> _Node | None:
    if "jax" not in sys.modules:
        return None
    tree_util = sys.modules["jax"].tree_util
    keyed, structure = tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)
    if any(not path for path, _ in keyed):  # the node is its own leaf
        return None
    entries = [tree_util.keystr(path, simple=True, separator=".") for path, _ in keyed]
    return _Node(entries, [child for _, child in keyed], structure.unflatten)


def _open_dataclass(node: Tree) -> _Node | None:
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return None
    names = [field.name for field in dataclasses.fields(node) if field.init and "static" not in field.metadata]
    return _Node(
        names,
        [getattr(node, name) for name in names],
        lambda children: dataclasses.replace(node, **dict(zip(names, children, strict=True))),
    )


def _value(leaf: Any) -> Any:
    """Return a leaf, a variable of Keras as the array that it holds."""
    keras = sys.modules.get("keras")
    return leaf.value if keras is not None and isinstance(leaf, keras.Variable) else leaf


class _Flat(NamedTuple):
    """A tree's leaves by dotted path, and the kind of every container by its entries, to compare structures by."""

    leaves: dict[str, Array]
    containers: dict[tuple[str, ...], type]


def _flatten(tree: Tree) -> _Flat:
    flat = _Flat({}, {})
    count, _ = _collect(tree, (), flat, None)
    if len(flat.leaves) < count:
        raise BecameError("two leaves of a tree have the same dotted path, as in {'a.b': x, 'a': {'b': y}}.")
    return flat


def _collect(node: Tree, path: tuple[str, ...], flat: _Flat, kind_of_leaf: type | None) -> tuple[int, type | None]:
    """Add what is at and below a node, and return how many leaves that are, and the type of the last array.

    It is no function within ``_flatten``, which would refer to itself, and so keep the arrays of every tree in memory
    until Python looks for cycles.
    """
    opened = _open(node)
    if opened is None:
        flat.leaves[".".join(path)] = node = _value(node)
        return 1, type(node) if is_array(node) else kind_of_leaf
    # Mappings may differ in the order of their keys.
    flat.containers[path] = Mapping if isinstance(node, Mapping) else type(node)
    prefix, count = ".".join((*path, "")), 0
    for entry, child in zip(opened.entries, opened.children, strict=True):
        # Most leaves are of one type, so that a framework is asked only about the first of them. This matters: trees of
        # 30,000 leaves are merged, and the arithmetic on a small leaf takes only about ten microseconds.
        if type(child) is kind_of_leaf:
            count += 1
            flat.leaves[f"{prefix}{entry}"] = child
        else:
            more, kind_of_leaf = _collect(child, (*path, str(entry)), flat, kind_of_leaf)
            count += more
    return count, kind_of_leaf


def named_leaves(tree: Tree) -> dict[str, Array]:
    """Return the leaves of a tree by their dotted paths, in the tree's order.

    Raises:
        BecameError: if two leaves have the same path.

    Example:
        >>> named_leaves({"fc": {"weight": 1.0, "bias": 2.0}})
        {'fc.weight': 1.0, 'fc.bias': 2.0}
    """
    return _flatten(tree).leaves


def aligned_rows(trees: Mapping[str, Tree]) -> dict[str, tuple[Array, ...]]:
    """Return the leaves of trees of one structure side by side: by dotted path, one array of each tree in order.

    Args:
        trees: the trees by the names that a message should call them; the others must match the first one.

    Raises:
        BecameError: naming the first leaf that is missing, superfluous, of another shape, framework or device, sparse
            or masked, or the tree whose containers differ.
    """
    flat = list(_flatten_alike(trees).values())
    paths = list(flat[0])
    columns = [[leaves[path] for path in paths] for leaves in flat]
    rows = dict(zip(paths, zip(*columns, strict=True), strict=True))
    kind = type(columns[0][0]) if paths else None
    if paths and not (is_array(columns[0][0]) and all(type(array) is kind for column in columns for array in column)):
        # They are of several types, which may still belong to one framework: parameters and tensors, say.
        namespace(**{label(name, path): row[i] for path, row in rows.items() for i, name in enumerate(trees)})
    for path, (reference, *others) in rows.items():
        shape = reference.shape
        for index, array in enumerate(others, start=1):
            # TensorFlow's shapes with unknown lengths are not equal to themselves, but their tuples are.
            if not (array.shape == shape or tuple(array.shape) == tuple(shape)):
                names = list(trees)
                raise BecameError(
                    f"{label(names[index], path)} has shape {tuple(array.shape)} but {label(names[0], path)} has "
                    f"{tuple(shape)}; make them equal."
                )
    _check_places(list(trees), rows)
    return rows


def _check_places(names: Sequence[str], rows: Mapping[str, tuple[Array, ...]]) -> None:
    """Raise a BecameError if a row's arrays lie on two devices, or an array is sparse or masked.

    Under a trace devices are not known, and the framework says what it cannot do.
    """
    if all(type(array) is np.ndarray for row in rows.values() for array in row):
        return  # by far the quickest check of many small leaves
    first = next(iter(rows.values()))[0]
    framework, module = framework_for(names[0], first)
    looks = framework.have_values(module, [first])
    arrays = [array for row in rows.values() for array in row]
    if framework.are_dense(module, arrays) and looks and len(set(map(framework.place, arrays))) == 1:
        return  # most often, and quicker than to look at each
    for path, row in rows.items():
        for name, array in zip(names, row, strict=True):
            if not framework.are_dense(module, [array]):
                raise BecameError(f"{label(name, path)} is a sparse or masked array; give one with all its elements.")
        places = [framework.place(array) for array in row] if looks else []
        known = [index for index, place in enumerate(places) if place is not None]
        for index in known[1:]:
            if places[index] != places[known[0]]:
                raise BecameError(
                    f"{label(names[known[0]], path)} is on {places[known[0]]} but {label(names[index], path)} on "
                    f"{places[index]}; move both to one device."
                )


def aligned_leaves(**trees: Tree) -> Iterator[dict[str, Array]]:
    """Walk trees of one structure side by side.

    Args:
        trees: the trees by the names that a message should call them; the others must match the first one.

    Yields:
        For each leaf, the arrays by labels for a message, ``"fisher_old 'conv1.weight'"``, in the order of the trees.

    Raises:
        BecameError: as ``aligned_rows`` does.
    """
    for path, row in aligned_rows(trees).items():
        yield {label(name, path): array for name, array in zip(trees, row, strict=True)}


def _flatten_alike(trees: Mapping[str, Tree]) -> dict[str, dict[str, Array]]:
    """Return each tree's leaves by dotted path; raise a BecameError unless all have the first one's structure."""
    reference_name, *_ = trees
    flat = {name: _flatten(tree) for name, tree in trees.items()}
    reference = flat[reference_name]
    for name, other in flat.items():
        for path in reference.leaves:
            if path not in other.leaves:
                raise BecameError(f"{name} lacks the leaf '{path}' that {reference_name} has; give equal structures.")
        for path in other.leaves if len(other.leaves) > len(reference.leaves) else ():
            if path not in reference.leaves:
                raise BecameError(f"{name} has a leaf '{path}' that {reference_name} lacks; give equal structures.")
    for name, other in flat.items():
        if not _nested_alike(other.containers, reference.containers):
            raise BecameError(f"{name} is nested otherwise than {reference_name}; give equal structures.")
    return {name: tree.leaves for name, tree in flat.items()}


def _nested_alike(one: dict[tuple[str, ...], type], other: dict[tuple[str, ...], type]) -> bool:
    # Not `==` of dictionaries: torch.compile of PyTorch 2.11 cannot trace the `==` of two classes.
    return len(one) == len(other) and all(other.get(path) is kind for path, kind in one.items())


def label(name: str, path: str) -> str:
    """Return what a message calls the leaf of this path in the tree of this name."""
    return f"{name} '{path}'" if path else name


def map_leaves(function: Callable[..., Array], tree: Tree, *others: Tree) -> Tree:
    """Apply a function leaf by leaf, the trees' leaves met by path; the result has the first tree's structure.

    Raises:
        BecameError: if the others' structure is not that of the first; it counts the trees from 1.
    """
    trees = {f"tree {number}": operand for number, operand in enumerate((tree, *others), start=1)}
    operands = list(_flatten_alike(trees).values())
    mapped = {path: function(*(leaves[path] for leaves in operands)) for path in operands[0]}
    return with_leaves(tree, mapped)


def with_leaves(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Return a tree of the same structure with other leaves, given by dotted path."""
    return _rebuild(tree, (), leaves)


def _rebuild(node: Tree, path: tuple[str, ...], leaves: Mapping[str, Any]) -> Tree:
    opened = _open(node)
    if opened is None:
        return leaves[".".join(path)]
    pairs = zip(opened.entries, opened.children, strict=True)
    return opened.rebuild([_rebuild(child, (*path, str(entry)), leaves) for entry, child in pairs])


def size_in_bytes(tree: Tree) -> int:
    """Return the memory that a tree's arrays take, each once; what is no array takes none."""
    arrays = {id(leaf): leaf for leaf in named_leaves(tree).values() if is_array(leaf)}
    return sum(_bytes(array) for array in arrays.values())


def _bytes(array: Array) -> int:
    xp: Any = namespace(array=array)
    dtype = array.dtype
    if xp.isdtype(dtype, "bool"):
        width = 1
    else:
        limits = xp.iinfo if xp.isdtype(dtype, "integral") else xp.finfo
        width = int(limits(dtype).bits) // 8
    return width * math.prod(int(length) for length in array.shape)


def difference(left: Params, right: Params) -> Params:
    """Return left - right, name by name; of two dtypes the promoted one."""
    pairs = {name: promoted(value, right[name]) for name, value in left.items()}
    return {name: value - other for name, (value, other) in pairs.items()}
