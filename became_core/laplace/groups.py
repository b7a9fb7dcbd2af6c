"""What shares one coefficient of a merge: the whole model, a layer, or a leaf."""

from typing import Literal

from became_core.arrays import Params, Tree, named_leaves, namespace
from became_core.errors import BecameError

__all__ = ["Per", "group_directions", "group_names", "group_of"]

Per = Literal["model", "layer", "leaf"]


def group_names(tree: Tree, per: Per) -> list[str]:
    """Return what shares a coefficient in a tree, in order: its layers, its leaves, or "" for the whole model."""
    return list(dict.fromkeys(group_of(path, per) for path in named_leaves(tree)))


def group_directions(delta: Params, per: Per) -> list[Params]:
    """Return for each of ``group_names`` a direction that is delta in the group's leaves and zero elsewhere."""
    zero = {name: namespace(delta=value).zeros_like(value) for name, value in delta.items()}
    return [
        {name: (delta if group_of(name, per) == group else zero)[name] for name in delta}
        for group in group_names(delta, per)
    ]


def group_of(path: str, per: Per) -> str:
    """Return the group that the leaf of this path belongs to.

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
