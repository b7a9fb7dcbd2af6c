"""Sums of products of millions of elements, accurate in float32, without a temporary of the size of what is summed.

Adding n numbers one after the other loses up to n units in the last place: past 2^24 equal ones, a float32 sum stands
still. So sums are taken in a binary tree (pairwise summation, Higham 1993), in which each number goes through log2(n)
additions: at worst 30 u = 1.8e-6 relative for 10^9 numbers of one sign, u = 6e-8 being half a unit; rounding to either
side leaves some 3e-7 of it. At the tree's leaves stand, where values exist, a library's own sums or inner products of
rows, so short that vector registers share the additions, or an accelerator's of a slab, which thousands of threads
share; in a compiler's loop, and where PyTorch adds products in place, a few numbers that are added in turn.

Arrays are walked in slabs that fit a processor's cache, so intermediate results never reach memory: in Python where
values exist; under a trace in the compiler's own loop, or not at all where the compiler fuses a sum with what is
summed. XLA on the CPU does not: it fuses element by element only, so slabs are added so to a running total.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from became_core.arrays.namespace import Array, fuses_inner_products, has_values, loop_of, namespace, on_cpu, slab_of
from became_core.arrays.scratch import Arithmetic, Scratch, Workspace

__all__ = ["inner_products", "staged_sum"]

# Elements of a slab in a compiler's loop, and how many slabs are added one after the other. Powers of two.
LOOP_SLAB, RUN = 2**16, 2**4
# Elements of a row, whose sum or inner product a library takes at once.
ROW = 2**10
# Numbers that are added at once, in a binary tree: a power of two.
STAGE = 2**6

# From an arithmetic and flat pieces of arrays, side by side, to the two factors of each product, of the same length.
Factors = Callable[[Arithmetic, list[Array]], Sequence[tuple[Array, Array]]]
# What looks at the values of such pieces.
Look = Callable[[Scratch, list[Array]], None]


def inner_products(
    factors: Factors,
    arrays: Sequence[Array],
    workspace: Workspace | None = None,
    look: Look = lambda scratch, pieces: None,
) -> list[Array]:
    """Return the sums of products whose factors are computed from arrays element by element, 0-d arrays.

    Args:
        factors: the two factors of each product, from an arithmetic and flat pieces of the arrays.
        arrays: of one shape.
        workspace: the memory to compute in where values exist; new if not given.
        look: called there with all pieces, each time after their products, when they are in the cache.
    """
    xp = namespace(**{f"array {index}": array for index, array in enumerate(arrays)})
    flat = [xp.reshape(array, (-1,)) for array in arrays]
    if all(has_values(array) for array in arrays):
        return _by_slab(factors, look, flat, workspace or Workspace())

    def products(pieces: list[Array]) -> list[Array]:
        return [left * right for left, right in factors(Arithmetic(), pieces)]

    loop = loop_of(flat[0])
    if loop is None or int(flat[0].shape[0]) < LOOP_SLAB:
        return [xp.sum(product) for product in products(flat)]
    by_run = loop(lambda pieces: xp.stack(products(pieces)), _halve_to_one, flat, LOOP_SLAB, RUN)
    return [staged_sum(by_run[:, index]) for index in range(int(by_run.shape[1]))]


def _by_slab(factors: Factors, look: Look, flat: Sequence[Array], workspace: Workspace) -> list[Array]:
    xp, sums = namespace(first=flat[0]), workspace.sums
    workspace.factors.begin(flat)
    sums.begin(flat)

    def pairs(pieces: list[Array]) -> Sequence[tuple[Array, Array]]:
        workspace.factors.forget()
        return factors(workspace.factors, pieces)

    parts, slabs = [], _slabs(flat)
    if fuses_inner_products(flat[0]):
        for pieces in slabs:
            parts.append([_inner_product(left, right) for left, right in pairs(pieces)])
            look(workspace.factors, pieces)
    else:
        while run := list(islice(slabs, RUN if sums.accumulates else 1)):
            sums.forget()
            totals = [sums.mul(left, right) for left, right in pairs(run[0])]
            look(workspace.factors, run[0])
            for pieces in run[1:]:
                for total, (left, right) in zip(totals, pairs(pieces), strict=True):
                    sums.accumulate(total, left, right)
                look(workspace.factors, pieces)
            parts.append([_sum(total) for total in totals])
    return [staged_sum(xp.stack(column)) for column in zip(*parts, strict=True)]


def _inner_product(left: Array, right: Array) -> Array:
    xp = namespace(left=left, right=right)
    if left.shape[0] < ROW or not on_cpu(left):
        return xp.vecdot(left, right)
    (left, left_over), (right, right_over) = _rows(left), _rows(right)
    return xp.sum(xp.vecdot(left, right)) + xp.vecdot(left_over, right_over)


def _sum(values: Array) -> Array:
    xp = namespace(values=values)
    if values.shape[0] < ROW or not on_cpu(values):
        return xp.sum(values)
    values, left_over = _rows(values)
    return xp.sum(xp.sum(values, axis=1)) + xp.sum(left_over)


def _rows(values: Array) -> tuple[Array, Array]:
    """A flat array as rows [rows, ROW], and what is left over."""
    rows = int(values.shape[0]) // ROW
    return namespace(values=values).reshape(values[: rows * ROW], (rows, ROW)), values[rows * ROW :]


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
