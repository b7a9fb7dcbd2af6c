"""OGD, orthogonal gradient descent (Farajtabar, Azizan, Mott & Li, AISTATS 2020, arXiv 1910.07104, Algorithm 1).

With grad f_y(x; theta) the gradient of the true class's logit at stored samples x, by all shared parameters at once:

    memory  S = these gradients of all tasks, orthonormalised, [parameters, k]
    update  g <- g - S S^T g

What differs: memory is bounded. A task's gradients, less their part in S, are kept as their leading singular
directions, found from a Gram matrix as they stream by, and every task has an equal share of ``capacity``: when one
more comes, the others give up their last ones, on which their gradients load least. With capacity for all samples, S
spans what the paper's does.

Convention: S is kept leaf by leaf, directions first, [k, *parameter shape], task by task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, pytree, static
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask, Projector, integers
from became_core.projection.rows import flat, orthonormal, part_within, size
from became_core.registry import setting

__all__ = ["OGD", "SHARED"]

# What messages, and ``rank``, call the space of all shared parameters.
SHARED = "shared parameters"


@pytree
@dataclass(frozen=True)
class OGD(Projector):
    """Orthogonal gradient descent: updates leave the span of old samples' logit gradients (Farajtabar 2020).

    The memory is orthonormal directions in the space of all shared parameters.

    Attributes:
        samples: how many training samples of each task give a gradient.
        capacity: how many directions are kept in all, at most.
        blocks: how many of them are each task's, in the order of tasks.
        directions: for each shared parameter, its part of them, [k, *shape].

    Raises:
        BecameError: if samples or capacity are below 1.
    """

    samples: int = setting(200, option="ogd_samples")
    capacity: int = setting(200, option="ogd_capacity")
    blocks: tuple[int, ...] = static(default=())
    directions: Params = field(default_factory=dict)

    protects_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, number in (("number of samples", self.samples), ("capacity", self.capacity)):
            if number < 1:
                raise BecameError(f"the OGD {name} is {number}; it must be at least 1.")

    def project(self, updates: Params) -> Params:
        """Return g - S S^T g; a parameter without directions is unchanged, one without an update counts as zero."""
        names = [name for name in updates if name in self.directions]
        if not names:
            return dict(updates)
        rank, width = self.rank[SHARED]
        if rank >= width:
            return dict(updates) | {name: namespace(update=updates[name]).zeros_like(updates[name]) for name in names}
        rows = {name: _row(updates[name], self.directions[name]) for name in names}
        within = part_within(rows, flat({name: self.directions[name] for name in names}))
        return dict(updates) | {name: _less(updates[name], within[name]) for name in names}

    @property
    def rank(self) -> dict[str, tuple[int, int]]:
        """The number of directions, and of shared parameters."""
        width = sum(size(leaf) for leaf in self.directions.values())
        return {SHARED: (sum(self.blocks), width)} if self.directions else {}

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task's directions.

        Raises:
            BecameError: if there is no gradient, or gradients are not of the parameters that the memory knows.
        """
        tasks = len(self.blocks) + 1
        shares = [self.capacity // tasks + (task < self.capacity % tasks) for task in range(tasks)]
        blocks = [min(block, share) for block, share in zip(self.blocks, shares, strict=False)]
        kept = self._leading(blocks)
        if not shares[-1]:
            return replace(self, blocks=(*blocks, 0), directions=kept)
        gradients = (self._checked(batch) for batch in task.logit_gradients(self.samples))
        added, shapes = orthonormal(gradients, flat(kept), shares[-1])
        directions = {}
        for name, rows in added.items():
            xp: Any = namespace(rows=rows)
            leaf = xp.reshape(rows, (rows.shape[0], *shapes[name]))
            directions[name] = xp.concat([kept[name], leaf], axis=0) if kept else leaf
        return replace(self, blocks=(*blocks, int(next(iter(added.values())).shape[0])), directions=directions)

    def to_arrays(self) -> dict[str, Array]:
        """Return the directions by parameter, and how many are each task's."""
        arrays = {f"directions.{name}": leaf for name, leaf in self.directions.items()}
        return arrays | {"blocks": integers(self.blocks, arrays)}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return this projector with the memory that ``to_arrays`` gave.

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
        """The directions, of each task only the first ones."""
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


def _row(update: Array, direction: Array) -> Array:
    xp: Any = namespace(update=update, direction=direction)
    return xp.reshape(xp.astype(update, direction.dtype, copy=False), (1, size(direction)))


def _less(update: Array, row: Array) -> Array:
    xp: Any = namespace(update=update)
    return update - xp.reshape(xp.astype(row, update.dtype, copy=False), update.shape)
