"""Which framework an array belongs to, trees and values of arrays, and how and in which precision they are summed."""

from became_core.arrays.frameworks import is_array
from became_core.arrays.namespace import (
    Array,
    check_values,
    device,
    eigh,
    has_values,
    in_single,
    lerp_of,
    namespace,
    on_host,
    promoted,
    reduction_dtype,
)
from became_core.arrays.products import row_products
from became_core.arrays.shards import Reduce, Shared, hold, is_spread, shared_by_processes
from became_core.arrays.sums import Factors, SumsOfProducts, sums_of_products, tree_sum
from became_core.arrays.trees import (
    Params,
    Tree,
    aligned_leaves,
    aligned_rows,
    difference,
    label,
    map_leaves,
    named_leaves,
    size_in_bytes,
    with_leaves,
)
from became_core.arrays.values import pytree, static

__all__ = [
    "Array",
    "Factors",
    "Params",
    "Reduce",
    "Shared",
    "SumsOfProducts",
    "Tree",
    "aligned_leaves",
    "aligned_rows",
    "check_values",
    "device",
    "difference",
    "eigh",
    "has_values",
    "hold",
    "in_single",
    "is_array",
    "is_spread",
    "label",
    "lerp_of",
    "map_leaves",
    "named_leaves",
    "namespace",
    "on_host",
    "promoted",
    "pytree",
    "reduction_dtype",
    "row_products",
    "shared_by_processes",
    "size_in_bytes",
    "static",
    "sums_of_products",
    "tree_sum",
    "with_leaves",
]
