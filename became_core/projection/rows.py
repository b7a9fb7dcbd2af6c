"""Rows over several leaves: the leading directions of many that stream by, orthonormal beside those kept.

Convention: rows are flat and lie leaf by leaf, [n, p] each; inner products run over all leaves and are summed in
float64, the rest is computed in the leaves' dtype.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from became_core.arrays import Array, Params, namespace, reduction_dtype
from became_core.errors import BecameError
from became_core.projection.energy import spectrum, wide

__all__ = ["flat", "orthonormal", "part_within", "size"]

# Columns that are summed at once in float64.
SLAB = 2**13


def orthonormal(gradients: Iterable[Params], kept: Params, share: int) -> tuple[Params, dict[str, tuple[int, ...]]]:
    """Return the leading directions of gradients beside those kept, flat and orthonormal, and the leaves' shapes.

    What waits for the next singular value decomposition is never more than twice the share, and a batch.
    """
    waiting: list[Params] = []
    shapes: dict[str, tuple[int, ...]] = {}
    energy = 0.0
    for batch in gradients:
        shapes = {name: tuple(leaf.shape[1:]) for name, leaf in batch.items()}
        rows = flat(batch)
        energy += sum(float(namespace(leaf=leaf).sum(leaf * leaf)) for leaf in rows.values())
        waiting.append(_part_outside(rows, kept))
        if sum(_count(each) for each in waiting) > 2 * share:
            waiting = [_compressed(_joined(waiting), share, energy)]
    if not waiting:
        raise BecameError("OGD remembers a task by its samples' gradients; none was given.")
    width = sum(leaf.shape[1] for leaf in waiting[0].values())
    rows = _compressed(_joined(waiting), min(share, width - _count(kept)), energy)
    if _count(rows):
        for _ in range(2):  # the second time mends what rounding left of the first
            rows = _gram_schmidt(_part_outside(rows, kept))
    return rows, shapes


def _compressed(rows: Params, most: int, energy: float) -> Params:
    """Return rows [k, p] with the leading singular directions of rows [m, p], each as long as its singular value."""
    gram = _gram(rows)
    xp: Any = namespace(gram=gram)
    values, vectors = spectrum(gram)
    unit_of_gram, unit = (16 * float(xp.finfo(each.dtype).eps) for each in (gram, next(iter(rows.values()))))
    # Below the one, a Gram matrix cannot tell a value from zero; below the other, what is left of old directions.
    floor = max(unit_of_gram * float(values[0]), unit**2 * energy)
    count = min(most, int(xp.sum(xp.astype(values > floor, xp.int32))))
    return _times(xp.matrix_transpose(vectors[:, :count]), rows)


def _gram_schmidt(rows: Params) -> Params:
    """Return rows made orthonormal in their order: L^-1 rows, with rows rows^T = L L^T."""
    gram = _gram(rows)
    xp: Any = namespace(gram=gram)
    norms = xp.sqrt(xp.linalg.diagonal(gram))
    lower = xp.linalg.cholesky(gram / (norms[:, None] * norms[None, :]))
    return _times(xp.linalg.inv(lower) / norms[None, :], rows)


def _gram(rows: Params) -> Array:
    """Inner products [m, m] of rows over all leaves, in float64."""
    total: Any = 0.0
    for leaf in rows.values():
        xp: Any = namespace(leaf=leaf)
        for start in range(0, leaf.shape[1], SLAB):
            piece = wide(leaf[:, start : min(start + SLAB, leaf.shape[1])])
            total = xp.matmul(piece, xp.matrix_transpose(piece)) + total
    return total


def _times(matrix: Array, rows: Params) -> Params:
    xp: Any = namespace(matrix=matrix)
    return {name: xp.matmul(xp.astype(matrix, leaf.dtype), leaf) for name, leaf in rows.items()}


def part_within(rows: Params, directions: Params) -> Params:
    """The part of rows [n, p] in the span of orthonormal directions [k, p], both over the same leaves."""
    along: Any = 0.0
    for name, leaf in rows.items():
        xp: Any = namespace(rows=leaf, directions=directions[name])
        along = xp.matmul(leaf, xp.matrix_transpose(directions[name])) + along
    return _times(along, directions)


def _part_outside(rows: Params, directions: Params) -> Params:
    if not directions:
        return rows
    within = part_within(rows, directions)
    return {name: leaf - within[name] for name, leaf in rows.items()}


def flat(leaves: Params) -> Params:
    """Leaves [n, *shape] as rows [n, p], in at least float32."""
    rows = {}
    for name, leaf in leaves.items():
        xp: Any = namespace(leaf=leaf)
        dtype = reduction_dtype(xp, leaf=leaf)
        rows[name] = xp.reshape(xp.astype(leaf, dtype, copy=False), (leaf.shape[0], size(leaf)))
    return rows


def _joined(batches: Sequence[Params]) -> Params:
    if len(batches) == 1:
        return batches[0]
    return {
        name: namespace(leaf=leaf).concat([batch[name] for batch in batches], axis=0)
        for name, leaf in batches[0].items()
    }


def size(leaf: Array) -> int:
    """The number of entries of each of a leaf's rows."""
    return math.prod(leaf.shape[1:])


def _count(rows: Params) -> int:
    return next((int(leaf.shape[0]) for leaf in rows.values()), 0)
