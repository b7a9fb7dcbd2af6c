"""OGD, orthogonal gradient descent (Farajtabar, Azizan, Mott & Li, AISTATS 2020, arXiv 1910.07104, Algorithm 1).

With grad f_y(x; theta) the gradient of the true class's logit at a stored sample x, by all shared parameters at once:

    memory  S = the gradients of all tasks' samples, orthonormalised, [parameters, k]
    update  g <- g - S S^T g

What differs: the memory is bounded. Of a task's gradients, less their part in S, the leading singular directions are
kept. They are found from a Gram matrix, batch by batch. Every task has an equal share of ``capacity``: when a task is
added, each earlier task gives up its last directions, in which its gradients have the least energy. If the capacity is
large enough for all samples, S spans the same space as in the paper.

Convention: S is stored leaf by leaf with the directions first, [k, *parameter shape], in the order of the tasks. While
directions are found, a leaf is flat, [n, p]. Inner products run over all leaves and are summed in float64; everything
else is computed in the dtype of the leaves.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, pytree, reduction_dtype, static
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask, Projector, TaskStart, integers
from became_core.projection.subspace import spectrum, wide
from became_core.registry import setting

__all__ = ["OGD", "SHARED"]

# The name, in ``rank`` and in messages, of the space of all shared parameters.
SHARED = "shared parameters"

# How many columns of a leaf are converted to float64 at once, so that no float64 copy of a whole leaf exists.
SLAB = 2**13


@pytree
@dataclass(frozen=True)
class OGD(Projector):
    """Orthogonal gradient descent: updates leave the span of old samples' logit gradients (Farajtabar 2020).

    The memory is orthonormal directions in the space of all shared parameters.

    Attributes:
        samples: how many training samples of each task give a gradient.
        capacity: how many directions are kept in all, at most.
        blocks: how many of the directions belong to each task, in the order of tasks.
        directions: for each shared parameter, its part of the directions, [k, *shape].

    Raises:
        BecameError: if samples or capacity are below 1.

    Examples:
        >>> import numpy as np
        >>> class Task:
        ...     def logit_gradients(self, count):
        ...         yield {"w": np.array([[3.0, 0.0]]), "b": np.array([[4.0]])}  # one sample
        >>> memory = OGD().remember(Task())
        >>> memory.rank
        {'shared parameters': (1, 3)}
        >>> projected = memory.project({"w": np.array([3.0, 1.0]), "b": np.array([4.0])})
        >>> np.allclose(projected["w"], [0.0, 1.0]), np.allclose(projected["b"], [0.0])
        (True, True)
    """

    samples: int = setting(200, option="ogd_samples")
    capacity: int = setting(200, option="ogd_capacity")
    blocks: tuple[int, ...] = static(default=())
    directions: Params = field(default_factory=dict)

    no_adapters: ClassVar[str] = (
        "its directions are gradients by whole weights, of all layers at once, which no step of a factor can avoid"
    )
    protects_all: ClassVar[bool] = True
    needs_labels: ClassVar[str] = "it remembers gradients of the true class's logit"

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, number in (("number of samples", self.samples), ("capacity", self.capacity)):
            if number < 1:
                raise BecameError(f"the OGD {name} is {number}; it must be at least 1.")

    def project(self, updates: Params) -> Params:
        """Return g - S S^T g.

        Args:
            updates: by name; a parameter without directions is returned as it is, and a parameter that has directions
                but no update counts as zero.
        """
        names = [name for name in updates if name in self.directions]
        if not names:
            return dict(updates)
        rank, width = self.rank[SHARED]
        if rank >= width:
            return dict(updates) | {name: namespace(update=updates[name]).zeros_like(updates[name]) for name in names}
        rows = {name: _row(updates[name], self.directions[name]) for name in names}
        within = _part_within(rows, _flat({name: self.directions[name] for name in names}))
        return dict(updates) | {name: _less(updates[name], within[name]) for name in names}

    @property
    def rank(self) -> dict[str, tuple[int, int]]:
        """The number of directions, and the number of entries of all shared parameters."""
        width = sum(_size(leaf) for leaf in self.directions.values())
        return {SHARED: (sum(self.blocks), width)} if self.directions else {}

    def prepare(self, start: TaskStart) -> Self:
        """Return the projector as it is.

        Raises:
            BecameError: if the network has no shared weights, and so nothing to protect.
        """
        if not set(start.weights).difference(*start.heads):
            raise BecameError("OGD protects shared weights, and the network has none to train; choose another method.")
        return self

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task's directions.

        Raises:
            BecameError: if there is no gradient, or gradients are not of the parameters that the memory knows.
        """
        tasks = len(self.blocks) + 1
        shares = [self.capacity // tasks + (number < self.capacity % tasks) for number in range(tasks)]
        blocks = [min(block, share) for block, share in zip(self.blocks, shares, strict=False)]
        old = self._leading(blocks)
        if not shares[-1]:
            return replace(self, blocks=(*blocks, 0), directions=old)
        gradients = (self._checked(batch) for batch in task.logit_gradients(self.samples))
        added, shapes = _orthonormal(gradients, _flat(old), shares[-1])
        directions = {}
        for name, rows in added.items():
            xp: Any = namespace(rows=rows)
            leaf = xp.reshape(rows, (rows.shape[0], *shapes[name]))
            directions[name] = xp.concat([old[name], leaf], axis=0) if old else leaf
        return replace(self, blocks=(*blocks, int(next(iter(added.values())).shape[0])), directions=directions)

    def to_arrays(self) -> dict[str, Array]:
        """Return the directions by parameter, and the number of directions of each task."""
        arrays = {f"directions.{name}": leaf for name, leaf in self.directions.items()}
        return arrays | {"blocks": integers(self.blocks, arrays)}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return this projector with the memory that ``to_arrays`` returned.

        Raises:
            BecameError: if an array is no part of such a memory, or the blocks are missing.
        """
        for key in arrays:
            if key != "blocks" and not key.startswith("directions."):
                raise BecameError(f"the array '{key}' is no part of a memory of OGD.")
        if "blocks" not in arrays:
            raise BecameError("the memory of OGD lacks 'blocks', the number of directions of each task.")
        blocks = arrays["blocks"]
        directions = {key.removeprefix("directions."): leaf for key, leaf in arrays.items() if key != "blocks"}
        return replace(self, blocks=tuple(int(blocks[i]) for i in range(blocks.shape[0])), directions=directions)

    def _leading(self, blocks: Sequence[int]) -> Params:
        """The directions, with only the first ``blocks[t]`` of those of each task t."""
        if list(self.blocks) == list(blocks):
            return self.directions
        starts = [sum(self.blocks[:task]) for task in range(len(blocks))]
        pieces = [slice(start, start + block) for start, block in zip(starts, blocks, strict=True)]
        return {
            name: namespace(leaf=leaf).concat([leaf[piece, ...] for piece in pieces], axis=0)
            for name, leaf in self.directions.items()
        }

    def _checked(self, batch: Params) -> Params:
        for name in self.directions | batch:
            if self.directions and (name not in batch or name not in self.directions):
                where = "gradients" if name in self.directions else "memory"
                raise BecameError(f"the {where} of OGD lack '{name}'; give the same shared parameters for every task.")
            if self.directions and tuple(batch[name].shape[1:]) != tuple(self.directions[name].shape[1:]):
                raise BecameError(
                    f"gradients of '{name}' have shape {tuple(batch[name].shape[1:])}; the memory's directions have "
                    f"{tuple(self.directions[name].shape[1:])}."
                )
        return batch


def _orthonormal(gradients: Iterable[Params], old: Params, share: int) -> tuple[Params, dict[str, tuple[int, ...]]]:
    """Return the leading directions of gradients, orthonormal among themselves and to old ones; and the leaves' shapes.

    Args:
        gradients: batches of gradients, each leaf [samples, *shape].
        old: the flat directions that the memory has already, each leaf [k, p].
        share: how many new directions there may be.
    """
    waiting: list[Params] = []
    shapes: dict[str, tuple[int, ...]] = {}
    energy = 0.0
    for batch in gradients:
        shapes = {name: tuple(leaf.shape[1:]) for name, leaf in batch.items()}
        rows = _flat(batch)
        energy += sum(float(namespace(leaf=leaf).sum(leaf * leaf)) for leaf in rows.values())
        waiting.append(_part_outside(rows, old))
        # Rows are compressed to the share whenever they are more than twice as many, which bounds the memory by twice
        # the share and one batch.
        if sum(_count(part) for part in waiting) > 2 * share:
            waiting = [_compressed(_joined(waiting), share, energy)]
    if not waiting:
        raise BecameError("OGD remembers a task by its samples' gradients; none was given.")
    width = sum(leaf.shape[1] for leaf in waiting[0].values())
    rows = _compressed(_joined(waiting), min(share, width - _count(old)), energy)
    if _count(rows):
        # Rounding of the first pass leaves rows that are not quite orthogonal; the second pass removes that.
        for _ in range(2):
            rows = _gram_schmidt(_part_outside(rows, old))
    return rows, shapes


def _compressed(rows: Params, most: int, energy: float) -> Params:
    """Return at most so many leading singular directions of rows [m, p], each as long as its singular value.

    Args:
        rows: each leaf [m, p].
        most: how many directions there may be.
        energy: the sum of squares of all gradients before their part in old directions was removed.
    """
    gram = _gram(rows)
    xp: Any = namespace(gram=gram)
    values, vectors = spectrum(gram)
    unit_of_gram, unit = (16 * float(xp.finfo(array.dtype).eps) for array in (gram, next(iter(rows.values()))))
    # Two floors. A Gram matrix cannot tell an eigenvalue below its own rounding from zero. And removing old directions
    # in the rows' dtype leaves a part as long as that dtype's rounding of the original gradient, which is no direction
    # of the task.
    floor = max(unit_of_gram * float(values[0]), unit**2 * energy)
    count = min(most, int(xp.sum(xp.astype(values > floor, xp.int32))))
    return _times(xp.matrix_transpose(vectors[:, :count]), rows)


def _gram_schmidt(rows: Params) -> Params:
    """Return rows made orthonormal in their order: L^-1 rows, with rows rows^T = L L^T."""
    gram = _gram(rows)
    xp: Any = namespace(gram=gram)
    # The Cholesky factor is taken of rows of length 1, since lengths differ by many orders of magnitude.
    norms = xp.sqrt(xp.linalg.diagonal(gram))
    lower = xp.linalg.cholesky(gram / (norms[:, None] * norms[None, :]))
    return _times(xp.linalg.inv(lower) / norms[None, :], rows)


def _gram(rows: Params) -> Array:
    """Return the inner products [m, m] of rows over all leaves, in float64."""
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


def _part_within(rows: Params, directions: Params) -> Params:
    """Return the part of rows [n, p] in the span of orthonormal directions [k, p] over the same leaves."""
    along: Any = 0.0
    for name, leaf in rows.items():
        xp: Any = namespace(rows=leaf, directions=directions[name])
        along = xp.matmul(leaf, xp.matrix_transpose(directions[name])) + along
    return _times(along, directions)


def _part_outside(rows: Params, directions: Params) -> Params:
    if not directions:
        return rows
    within = _part_within(rows, directions)
    return {name: leaf - within[name] for name, leaf in rows.items()}


def _flat(leaves: Params) -> Params:
    """Return leaves [n, *shape] as rows [n, p], in at least float32."""
    rows = {}
    for name, leaf in leaves.items():
        xp: Any = namespace(leaf=leaf)
        dtype = reduction_dtype(xp, leaf=leaf)
        rows[name] = xp.reshape(xp.astype(leaf, dtype, copy=False), (leaf.shape[0], _size(leaf)))
    return rows


def _joined(batches: Sequence[Params]) -> Params:
    if len(batches) == 1:
        return batches[0]
    return {
        name: namespace(leaf=leaf).concat([batch[name] for batch in batches], axis=0)
        for name, leaf in batches[0].items()
    }


def _size(leaf: Array) -> int:
    """Return the number of entries of each row of a leaf."""
    return math.prod(leaf.shape[1:])


def _count(rows: Params) -> int:
    return next((int(leaf.shape[0]) for leaf in rows.values()), 0)


def _row(update: Array, direction: Array) -> Array:
    xp: Any = namespace(update=update, direction=direction)
    return xp.reshape(xp.astype(update, direction.dtype, copy=False), (1, _size(direction)))


def _less(update: Array, row: Array) -> Array:
    xp: Any = namespace(update=update)
    return update - xp.reshape(xp.astype(row, update.dtype, copy=False), update.shape)
