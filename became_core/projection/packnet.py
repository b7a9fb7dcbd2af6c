"""PackNet, a network packed with tasks by pruning (Mallya & Lazebnik, CVPR 2018, arXiv 1711.05769, Section 3).

    train      task t moves the free weights, which are all weights at first
    prune      in each layer, the share p of the free weights with the smallest |w| is set to 0 and stays free; the
               others now belong to task t
    retrain    task t moves its own weights, while the pruned ones stay 0
    evaluate   task t works with the weights of tasks 1 ... t; all others are 0

A weight that belongs to a task does not move in later tasks, so they do not change the outputs of an earlier task's
network, to the bit. Biases and normalisation are trained with the first task and then frozen. Running statistics of
normalisation layers, if the network has them, are not weights: later tasks do change them.

What differs: the published script gives the share pruned at each task by hand, by how many tasks there are (such as
0.5, 0.75, 0.75 for four), and retrains at a tenth of the learning rate. Here the share is one number for all tasks, so
that 1/2 leaves 1/1024 of the weights free after ten; ``equal_shares`` chooses it by the number of tasks, (T - t) / (T -
t + 1) at task t of T, which gives each task 1/T of the weights. ``retraining_rate`` is the factor of the rate.

Convention: the owner of a free weight is 0; the owner of any other weight is the number of its task, counted from 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, pytree, static
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask, Projector, TaskStart, View, integers
from became_core.registry import setting

__all__ = ["MaskedView", "PackNet"]

MOST_TASKS = 255  # An owner is one byte.


@pytree
@dataclass(frozen=True)
class PackNet(Projector):
    """Each task in the weights that none owns: trained, pruned, and retrained without the pruned ones (Mallya 2018).

    The memory is the owner of each entry of the weights.

    Attributes:
        share: the share of a layer's free weights that is pruned at each task, p in the paper; in [0, 1).
        equal_shares: whether every task keeps an equal number of weights, none being left free after the last one;
            ``--packnet-share`` is then not used.
        retraining_rate: what the learning rate is multiplied by after pruning; above 0. The published code has 0.1.
        tasks: how many tasks the memory has.
        expected: how many tasks there are in all; 0 until ``prepare`` is told.
        retrains: whether the next task is in its second stage, in which its own weights move; in the first stage, the
            free ones move.
        owners: the owner of each entry, uint8, in the shape of its weight.

    Raises:
        BecameError: if the share or the rate is not in its range.

    Examples:
        >>> import numpy as np
        >>> memory, theta = PackNet(share=0.5).between_stages({"w": np.array([[3.0, -1.0]])}, frozenset({"w"}))
        >>> theta["w"], memory.owners["w"]
        (array([[3., 0.]]), array([[1, 0]], dtype=uint8))
    """

    share: float = setting(0.5, option="packnet_share")
    equal_shares: bool = setting(False, option="packnet_even")
    retraining_rate: float = setting(1.0, option="packnet_retraining")
    tasks: int = static(default=0)
    expected: int = static(default=0)
    retrains: bool = static(default=False)
    owners: Params = field(default_factory=dict)

    no_adapters: ClassVar[str] = "its masks say for single weights which may change, and factors change all at once"
    alone: ClassVar[str] = "masks protect every weight that is in use"
    needs_own_heads: ClassVar[str] = (
        "a task works with a mask of its own, and a head that later tasks train would no longer fit the weights that "
        "it keeps"
    )
    stages: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.share < 1:
            raise BecameError(f"PackNet prunes a share of {self.share}; it must be at least 0 and below 1.")
        if not 0 < self.retraining_rate < math.inf:
            raise BecameError(f"PackNet retrains at {self.retraining_rate} of the learning rate; it must be above 0.")

    def prepare(self, start: TaskStart) -> Self:
        """Return the projector with the number of tasks, which equal shares depend on."""
        return replace(self, expected=len(start.heads))

    def _pruned_share(self) -> float:
        """Return the share of the free weights that is pruned at the next task."""
        if not self.equal_shares:
            return self.share
        later = max(self.expected - self.tasks - 1, 0)
        return later / (later + 1)

    def project(self, updates: Params) -> Params:
        """Return the updates, set to zero for each entry of a weight that the present stage may not move."""
        return {name: self._project(name, update) for name, update in updates.items()}

    def _project(self, name: str, update: Array) -> Array:
        if name not in self.owners:
            return update
        xp = namespace(update=update, owner=self.owners[name])
        moves = self.owners[name] == (self.tasks + 1 if self.retrains else 0)
        return xp.where(moves, update, xp.zeros_like(update))

    @property
    def rank(self) -> dict[str, tuple[int, int]]:
        """For each weight, how many of its entries belong to a task, and how many entries it has."""
        counts = {}
        for name, owner in self.owners.items():
            xp: Any = namespace(owner=owner)
            counts[name] = (int(xp.count_nonzero(owner)), math.prod(owner.shape))
        return counts

    def between_stages(self, theta: Params, projectable: frozenset[str]) -> tuple[Self, Params]:
        """Return the memory in which the next task owns its weights, and all parameters, with the pruned ones set to 0.

        Args:
            theta: the parameters after the task was trained in the free weights.
            projectable: names of the weights that have owners; all other parameters are returned as they are.

        Raises:
            BecameError: if there are more tasks than owners can tell apart.
        """
        if self.tasks >= MOST_TASKS:
            raise BecameError(f"PackNet's masks tell {MOST_TASKS} tasks apart; there is one more.")
        owners, weights, share = {}, dict(theta), self._pruned_share()
        for name in sorted(projectable):
            weight = theta[name]
            xp: Any = namespace(weight=weight)
            owner = self.owners.get(name)
            if owner is None:
                owner = xp.zeros_like(weight, dtype=xp.uint8)
            survives = _largest(weight, owner == 0, share)
            owners[name] = xp.where(survives, xp.zeros_like(owner) + (self.tasks + 1), owner)
            weights[name] = xp.where(owners[name] > 0, weight, xp.zeros_like(weight))
        return replace(self, owners=owners, retrains=True), weights

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task, whose weights do not move afterwards."""
        return replace(self, tasks=self.tasks + 1, retrains=False)

    def view(self, task: int) -> "MaskedView":
        """Return the view of a task, counted from 0: it works with the weights of all tasks up to this one."""
        return MaskedView(self.owners, task + 1)

    def to_arrays(self) -> dict[str, Array]:
        """Return the owners, the number of tasks, and whether the next task is in its second stage."""
        arrays = {f"owners.{name}": owner for name, owner in self.owners.items()}
        return arrays | {"tasks": integers(self.tasks, arrays), "retrains": integers(int(self.retrains), arrays)}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return a projector with the same share and the memory that ``to_arrays`` returned.

        Raises:
            BecameError: if an array is no part of such a memory, or one is missing.
        """
        owners = {}
        for key, value in arrays.items():
            part, _, name = key.partition(".")
            if part == "owners" and name:
                owners[name] = value
            elif key not in ("tasks", "retrains"):
                raise BecameError(f"the array '{key}' is no part of a memory of PackNet.")
        for key in ("tasks", "retrains"):
            if key not in arrays:
                raise BecameError(f"the memory of PackNet lacks '{key}'.")
        return replace(self, tasks=int(arrays["tasks"]), retrains=bool(int(arrays["retrains"])), owners=owners)


@pytree
@dataclass(frozen=True)
class MaskedView(View):
    """The effective weights of a task: entries that are free, or belong to a later task, are zero.

    Attributes:
        owners: the owner of each entry, by weight.
        latest: the number of the task, counted from 1; entries of later tasks are zero.
    """

    owners: Params
    latest: int = static()

    @property
    def weights(self) -> frozenset[str]:
        """The names of the weights that have owners."""
        return frozenset(self.owners)

    def effective(self, theta: Params) -> Params:
        """Return all parameters, with zeros for the entries that are free or belong to a later task.

        Raises:
            BecameError: if a weight is missing.
        """
        result = dict(theta)
        for name, owner in self.owners.items():
            if name not in theta:
                raise BecameError(f"the weights lack '{name}', which has a mask.")
            xp = namespace(weight=theta[name], owner=owner)
            is_used = (owner > 0) & (owner <= self.latest)
            result[name] = xp.where(is_used, theta[name], xp.zeros_like(theta[name]))
        return result


def _largest(weight: Array, free: Array, share: float) -> Array:
    """Return which free entries are left after a share of them, those with the smallest magnitude, is pruned."""
    xp: Any = namespace(weight=weight)
    pruned = int(share * int(xp.count_nonzero(free)))
    # Ranks, not a threshold, because several entries can have the same magnitude, zero for example: exactly the wanted
    # number is pruned, and of equal entries the first ones. An infinite magnitude puts entries that are not free last.
    magnitude = xp.where(free, xp.abs(weight), xp.zeros_like(weight) + math.inf)
    rank = xp.argsort(xp.argsort(xp.reshape(magnitude, (-1,))))
    return free & xp.reshape(rank >= pruned, weight.shape)
