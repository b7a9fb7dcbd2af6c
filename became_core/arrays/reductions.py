"""Sums over millions of elements: accurate in float32, and without a temporary of the size of what is summed.

Adding n numbers one after the other loses up to n units in the last place: past 2^24 equal ones, a float32 sum stands
still. So sums are taken in a binary tree (pairwise summation, Higham 1993), in which each number goes through log2(n)
additions: at worst 30 u = 1.8e-6 relative for 10^9 numbers of one sign, u = 6e-8 being half a unit; rounding to either
side leaves some 3e-7 of it. Where a library's own inner product stands at the leaves of the tree, it gets ``ROW``
elements, of which processors keep 16 or more partial sums.

Where values exist, arrays are walked in slabs that fit a processor's cache, so intermediate results never reach memory.
Under a trace the compiler fuses, and slabs would only hinder it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from became_core.arrays.namespace import Array, has_values, namespace

__all__ = ["inner_product", "slabs", "staged_sum"]

# Elements of a slab: with a few temporaries of as many float32 it stays within a core's cache.
SLAB = 2**16
ROW = 2**9
# Numbers that are added at once, in a binary tree: a power of two.
STAGE = 2**6


def slabs(arrays: Sequence[Array]) -> Iterator[list[Array]]:
    """Yield arrays of one shape side by side as flat pieces of at most ``SLAB`` elements; whole, under a trace."""
    xp = namespace(**{f"array {index}": array for index, array in enumerate(arrays)})
    flat = [xp.reshape(array, (-1,)) for array in arrays]
    size = int(flat[0].shape[0])
    if size <= SLAB or not all(has_values(array) for array in flat):
        yield flat
        return
    for start in range(0, size, SLAB):
        end = min(start + SLAB, size)
        yield [array[start:end] for array in flat]


def inner_product(arrays: Sequence[Array]) -> Callable[[Array, Array], Array]:
    """Return the function that gives the 0-d sum of left * right over flat pieces computed from these arrays."""
    xp = namespace(array=arrays[0])
    if not all(has_values(array) for array in arrays):
        return lambda left, right: staged_sum(left * right)

    def by_rows(left: Array, right: Array) -> Array:
        whole = left.shape[0] // ROW * ROW
        if not whole:
            return xp.vecdot(left, right)
        rows = xp.vecdot(xp.reshape(left[:whole], (-1, ROW)), xp.reshape(right[:whole], (-1, ROW)))
        return staged_sum(rows) + xp.vecdot(left[whole:], right[whole:])

    return by_rows


def staged_sum(values: Array) -> Array:
    """Return the sum of a flat array [n], a 0-d array."""
    xp: Any = namespace(values=values)
    while values.shape[0] > 1:
        terms = min(STAGE, 2 ** (values.shape[0].bit_length() - 1))
        columns = values.shape[0] // terms
        stage = xp.reshape(values[: terms * columns], (terms, columns))
        while stage.shape[0] > 1:
            half = stage.shape[0] // 2
            stage = stage[:half, :] + stage[half:, :]
        rest = values[terms * columns :]
        values = xp.concat([stage[0, :], rest]) if rest.shape[0] else stage[0, :]
    return xp.sum(values)
