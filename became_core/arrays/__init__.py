"""Which framework an array belongs to, trees and values of arrays, and how and in which precision they are summed."""

from became_core.arrays.frameworks import is_array
from became_core.arrays.namespace import (
    Array,
    check_values,
    device,
    has_values,
    have_values,
    lerp_of,
    namespace,
    on_host,
    reduction_dtype,
    repeated,
)
from became_core.arrays.reductions import group_sums, inner_products, stacked, staged_sum
from became_core.arrays.scratch import Arithmetic, Scratch, Workspace
from became_core.arrays.trees import (
    Params,
    Tree,
    aligned_leaves,
    difference,
    map_leaves,
    named_leaves,
    size_in_bytes,
    with_leaves,
)
from became_core.arrays.values import pytree, static

__all__ = [
    "Arithmetic",
    "Array",
    "Params",
    "Scratch",
    "Tree",
    "Workspace",
    "aligned_leaves",
    "check_values",
    "device",
    "difference",
    "group_sums",
    "has_values",
    "have_values",
    "inner_products",
    "is_array",
    "lerp_of",
    "map_leaves",
    "named_leaves",
    "namespace",
    "on_host",
    "pytree",
    "reduction_dtype",
    "repeated",
    "size_in_bytes",
    "stacked",
    "staged_sum",
    "static",
    "with_leaves",
]
