"""Sums over millions of elements: accurate in float32, and without a temporary of the size of what is summed.

Adding n numbers one after the other loses up to n units in the last place: past 2^24 equal ones, a float32 sum stands
still. So sums are taken in a binary tree (pairwise summation, Higham 1993), in which each number goes through log2(n)
additions: at worst 30 u = 1.8e-6 relative for 10^9 numbers of one sign, u = 6e-8 being half a unit; rounding to either
side leaves some 3e-7 of it. At the tree's leaves, where values exist, stands a library's own sum of a slab; NumPy,
PyTorch and TensorFlow take those pairwise themselves.

Arrays are walked in slabs that fit a processor's cache, so intermediate results never reach memory: in Python where
values exist, under a trace in the compiler's own loop, or not at all where the compiler fuses a sum with what is summed
(XLA on the CPU writes it to memory first).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from became_core.arrays.namespace import Array, has_values, loop_of, namespace

__all__ = ["staged_sum", "sums"]

# Elements of a slab: with a few temporaries of as many float32 it stays within the cache.
SLAB = 2**18
# Numbers that are added at once, in a binary tree: a power of two.
STAGE = 2**6


def sums(terms: Callable[[list[Array]], Sequence[Array]], arrays: Sequence[Array]) -> list[Array]:
    """Return the sums of terms that are computed from arrays element by element, a 0-d array for each term.

    Args:
        terms: from flat pieces of the arrays, side by side, to an array of the same length for each term.
        arrays: of one shape.
    """
    xp = namespace(**{f"array {index}": array for index, array in enumerate(arrays)})
    flat = [xp.reshape(array, (-1,)) for array in arrays]
    if all(has_values(array) for array in arrays):
        parts = [[xp.sum(term) for term in terms(piece)] for piece in _slabs(flat)]
        return [staged_sum(xp.stack(column)) for column in zip(*parts, strict=True)]
    loop, size = loop_of(flat[0]), int(flat[0].shape[0])
    if loop is None or size < SLAB:
        return [xp.sum(term) for term in terms(flat)]
    by_slab = loop(lambda pieces: xp.stack([xp.sum(term) for term in terms(pieces)]), flat, SLAB)
    rest = terms([array[size // SLAB * SLAB :] for array in flat])
    return [staged_sum(by_slab[:, index]) + xp.sum(term) for index, term in enumerate(rest)]


def _slabs(flat: Sequence[Array]) -> Iterator[list[Array]]:
    size = int(flat[0].shape[0])
    for start in range(0, max(size, 1), SLAB):
        end = min(start + SLAB, size)
        yield [array[start:end] for array in flat]


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
