"""Which framework an array belongs to, trees of arrays, and the precision in which they are reduced."""

from became_core.arrays.namespace import Array, check_values, device, namespace, reduction_dtype
from became_core.arrays.trees import Params, Tree, aligned_leaves, map_leaves, named_leaves

__all__ = [
    "Array",
    "Params",
    "Tree",
    "aligned_leaves",
    "check_values",
    "device",
    "map_leaves",
    "named_leaves",
    "namespace",
    "reduction_dtype",
]
