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

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

from became_core.arrays.namespace import Array, Walk, have_values, loop_of, namespace, walk_of
from became_core.arrays.scratch import Arithmetic, Scratch, Workspace

__all__ = ["group_sums", "inner_products", "stacked", "staged_sum"]

# Elements of a slab in a compiler's loop, and how many slabs are added one after the other. Powers of two.
LOOP_SLAB, RUN = 2**16, 2**4
# Elements of a row, whose sum or inner product a library takes at once.
ROW = 2**10
# Numbers that are added at once, in a binary tree: a power of two.
STAGE = 2**6

# From an arithmetic and flat pieces of arrays, side by side, to the two factors of each product, of the same length.
Factors = Callable[[Arithmetic, Sequence[Array]], Sequence[tuple[Array, Array]]]
# What looks at the values of such pieces.
Look = Callable[[Scratch, Sequence[Array]], None]


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
    if have_values(arrays):
        return _by_slab(xp, factors, look, flat, workspace or Workspace())

    def products(pieces: Sequence[Array]) -> list[Array]:
        return [left * right for left, right in factors(Arithmetic(), pieces)]

    loop = loop_of(flat[0])
    if loop is None or int(flat[0].shape[0]) < LOOP_SLAB:
        return [xp.sum(product) for product in products(flat)]
    by_run = loop(lambda pieces: xp.stack(products(pieces)), _halve_to_one, flat, LOOP_SLAB, RUN)
    return [staged_sum(by_run[:, index]) for index in range(int(by_run.shape[1]))]


def _by_slab(xp: Any, factors: Factors, look: Look, flat: Sequence[Array], workspace: Workspace) -> list[Array]:
    walk = walk_of(flat)
    workspace.serve(xp, walk)
    scratch, sums = workspace.factors, workspace.sums

    def pairs(pieces: Sequence[Array]) -> Sequence[tuple[Array, Array]]:
        scratch.forget()
        return factors(scratch, pieces)

    parts, slabs = [], _slabs(flat, walk.slab)
    if walk.fuses_inner_products:
        for pieces in slabs:
            parts.append([_inner_product(xp, walk, left, right) for left, right in pairs(pieces)])
            look(scratch, pieces)
    else:
        while run := list(islice(slabs, RUN if sums.accumulates else 1)):
            sums.forget()
            totals = [sums.mul(left, right) for left, right in pairs(run[0])]
            look(scratch, run[0])
            for pieces in run[1:]:
                for total, (left, right) in zip(totals, pairs(pieces), strict=True):
                    sums.accumulate(total, left, right)
                look(scratch, pieces)
            parts.append([_sum(xp, walk, total) for total in totals])
    if len(parts) == 1:
        return parts[0]
    return [staged_sum(xp.stack(column)) for column in zip(*parts, strict=True)]


def _inner_product(xp: Any, walk: Walk, left: Array, right: Array) -> Array:
    if walk.kernels is not None:
        return walk.kernels.inner_product(left, right)
    rows = int(left.shape[0]) // ROW
    if rows == 0 or not walk.rows:
        return xp.vecdot(left, right)
    whole = xp.sum(xp.vecdot(_rows(xp, left, rows), _rows(xp, right, rows)))
    return whole + xp.vecdot(left[rows * ROW :], right[rows * ROW :])


def _sum(xp: Any, walk: Walk, values: Array) -> Array:
    rows = int(values.shape[0]) // ROW
    if rows == 0 or not walk.rows:
        return xp.sum(values)
    return xp.sum(xp.sum(_rows(xp, values, rows), axis=1)) + xp.sum(values[rows * ROW :])


def _rows(xp: Any, values: Array, rows: int) -> Array:
    """The first so many rows of a flat array, [rows, ROW]."""
    return xp.reshape(values[: rows * ROW], (rows, ROW))


def _halve_to_one(values: Array) -> Array:
    """Return the sums of rows [rows, a power of two], added in a binary tree, [rows]."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values[:, 0]


def _slabs(flat: Sequence[Array], slab: int) -> Iterator[Sequence[Array]]:
    size = int(flat[0].shape[0])
    if size <= slab:
        yield flat
        return
    for start in range(0, size, slab):
        end = min(start + slab, size)  # the standard leaves it open what lies beyond
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


def group_sums(groups: Iterable[Sequence[Array]]) -> Array:
    """Return the sum of each group's 0-d arrays, [groups], in their promoted type."""
    groups = list(groups)
    sizes = [len(group) for group in groups]
    every = stacked([part for group in groups for part in group])
    ends = list(accumulate(sizes))
    xp = namespace(every=every)
    return xp.stack([staged_sum(every[end - size : end]) for size, end in zip(sizes, ends, strict=True)])


def stacked(parts: Sequence[Array]) -> Array:
    """Return 0-d arrays side by side, in their promoted type."""
    xp = namespace(**{f"part {index}": part for index, part in enumerate(parts)})
    first = parts[0].dtype
    if any(part.dtype != first for part in parts):
        dtype = xp.result_type(*(part.dtype for part in parts))
        parts = [xp.astype(part, dtype, copy=False) for part in parts]
    return xp.stack(parts)
