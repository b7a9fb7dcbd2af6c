"""Sums of products of millions of elements, accurate in float32, without a temporary of the size of what is summed.

Adding n numbers one after the other loses up to n units in the last place: past 2^24 equal ones, a float32 sum stands
still. So sums are taken in a binary tree (pairwise summation, Higham 1993), in which each number goes through log2(n)
additions: at worst 30 u = 1.8e-6 relative for 10^9 numbers of one sign, u = 6e-8 being half a unit; rounding to either
side leaves some 3e-7 of it. At the tree's leaves stands, where values exist, a library's own sum of a slab (PyTorch and
TensorFlow take those pairwise themselves) or its inner products of rows, so short that vector registers share the
additions; in a compiler's loop, a few numbers that are added in turn.

Arrays are walked in slabs that fit a processor's cache, so intermediate results never reach memory: in Python where
values exist; under a trace in the compiler's own loop, or not at all where the compiler fuses a sum with what is
summed. XLA on the CPU does not: it fuses element by element only, so slabs are added so to a running total.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from became_core.arrays.namespace import Array, fuses_inner_products, has_values, loop_of, namespace, slab_of
from became_core.arrays.scratch import Scratch

__all__ = ["inner_products", "staged_sum"]

# In a compiler's loop: elements of a slab, and how many slabs are added one after the other. Powers of two.
LOOP_SLAB, RUN = 2**17, 2**4
# Elements of a row, whose inner product a library takes at once.
ROW = 2**12
# Numbers that are added at once, in a binary tree: a power of two.
STAGE = 2**6

# From ``sub`` and ``mul``, the operator module's or a ``Scratch``'s, and flat pieces of arrays, side by side, to the
# two factors of each product, of the same length.
Factors = Callable[[Any, list[Array]], Sequence[tuple[Array, Array]]]


def inner_products(factors: Factors, arrays: Sequence[Array]) -> list[Array]:
    """Return the sums of products whose factors are computed from arrays element by element, 0-d arrays.

    Args:
        factors: the two factors of each product, from ``sub`` and ``mul`` and flat pieces of the arrays.
        arrays: of one shape.
    """
    xp = namespace(**{f"array {index}": array for index, array in enumerate(arrays)})
    flat = [xp.reshape(array, (-1,)) for array in arrays]
    if all(has_values(array) for array in arrays):
        return _by_slab(factors, flat)

    def products(pieces: list[Array]) -> list[Array]:
        return [left * right for left, right in factors(operator, pieces)]

    loop = loop_of(flat[0])
    if loop is None or int(flat[0].shape[0]) < LOOP_SLAB:
        return [xp.sum(product) for product in products(flat)]
    by_run = loop(lambda pieces: xp.stack(products(pieces)), _halve_to_one, flat, LOOP_SLAB, RUN)
    return [staged_sum(by_run[:, index]) for index in range(int(by_run.shape[1]))]


def _by_slab(factors: Factors, flat: Sequence[Array]) -> list[Array]:
    xp = namespace(first=flat[0])
    fuses = fuses_inner_products(flat[0])
    scratch, products = Scratch(flat), Scratch(flat)
    parts = []

    def summed(left: Array, right: Array) -> Array:
        if fuses:
            return _inner_product(left, right)
        products.forget()
        return xp.sum(products.mul(left, right))

    for piece in _slabs(flat):
        scratch.forget()
        parts.append([summed(left, right) for left, right in factors(scratch, piece)])
    return [staged_sum(xp.stack(column)) for column in zip(*parts, strict=True)]


def _inner_product(left: Array, right: Array) -> Array:
    xp = namespace(left=left, right=right)
    rows = int(left.shape[0]) // ROW
    if not rows:
        return xp.vecdot(left, right)
    by_row = xp.vecdot(*(xp.reshape(factor[: rows * ROW], (rows, ROW)) for factor in (left, right)))
    return xp.sum(by_row) + xp.vecdot(left[rows * ROW :], right[rows * ROW :])


def _halve_to_one(values: Array) -> Array:
    """Return the sums of rows [rows, a power of two], added in a binary tree, [rows]."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values[:, 0]


def _slabs(flat: Sequence[Array]) -> Iterator[list[Array]]:
    size = int(flat[0].shape[0])
    slab = slab_of(flat[0])
    for start in range(0, max(size, 1), slab):
        end = min(start + slab, size)
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
