"""Sums over millions of elements: accurate in float32, and without a temporary of the size of what is summed.

Adding n numbers one after the other in float32 loses some sqrt(n) / 2 units in the last place where rounding averages
out, and n of them at worst; past 2^24 equal ones the sum stands still. So sums are taken in stages (pairwise summation
with a wide base, Higham 1993): each adds at most ``STAGE`` numbers, 10^9 elements take five, and since the rounding of
all but the last averages over many sums, what is left for numbers of one sign is about 1e-7 relative.

Where values exist, arrays are walked in slabs that fit a processor's cache, so intermediate results never reach memory.
Under a trace the compiler fuses, and slabs would only hinder it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from became_core.arrays.namespace import Array, has_values, namespace

__all__ = ["inner_product", "slabs", "staged_sum"]

# Elements of a slab: with a few temporaries of as many float32 it stays within a core's cache.
SLAB = 2**16
STAGE = 64


def slabs(arrays: Sequence[Array]) -> Iterator[list[Array]]:
    """Yield arrays of one shape side by side as flat pieces of at most ``SLAB`` elements; whole, under a trace."""
    xp = namespace(**{f"array {index}": array for index, array in enumerate(arrays)})
    flat = [xp.reshape(array, (-1,)) for array in arrays]
    size = int(flat[0].shape[0])
    if size <= SLAB or not all(has_values(array) for array in flat):
        yield flat
        return
    for start in range(0, size, SLAB):
        yield [array[start : start + SLAB] for array in flat]


def inner_product(like: Array) -> Callable[[Array, Array], Array]:
    """Return the function that gives the sum of left * right over flat pieces, a 0-d array, for arrays like this one."""
    xp = namespace(array=like)
    if has_values(like):
        # Of a slab: no temporary, and many partial sums. A compiler would call it as it is, with arguments in memory.
        return xp.vecdot  # type: ignore[no-any-return]
    return lambda left, right: staged_sum(left * right)


def staged_sum(values: Array) -> Array:
    """Return the sum of a flat array [n], a 0-d array."""
    xp: Any = namespace(values=values)
    while values.shape[0] > STAGE:
        rows = values.shape[0] // STAGE
        whole = xp.sum(xp.reshape(values[: rows * STAGE], (STAGE, rows)), axis=0)
        rest = values[rows * STAGE :]
        values = xp.concat([whole, rest]) if rest.shape[0] else whole
    return xp.sum(values)
