"""PackNet, a network packed with tasks by pruning (Mallya & Lazebnik, CVPR 2018, arXiv 1711.05769, Section 3).

    train     task t, in the weights that are free: at first all of them
    prune     in each layer, of the free weights the share p with the smallest |w|: they become 0 and stay free
    retrain   the other ones, which are now the task's, while the pruned stay 0
    task t    sees the weights of tasks 1 ... t alone; all others are 0

No weight moves once it is a task's, so no later task changes what an earlier one's network says, to the bit. Biases and
normalisation are trained with the first task and then frozen. (Running statistics of a network's normalisation, if it
has them, are no weights: later tasks move them.)

Convention: an owner is 0 for a free weight, else the number of its task, from 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, pytree, static
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask, Projector, View, integers
from became_core.registry import setting

__all__ = ["MaskedView", "PackNet"]

MOST_TASKS = 255  # owners are bytes


@pytree
@dataclass(frozen=True)
class PackNet(Projector):
    """Each task in the weights that none owns: trained, pruned, and retrained without the pruned ones (Mallya 2018).

    The memory is which weight belongs to which task; no weight moves but those that the present stage trains.

    Attributes:
        share: the share of a layer's free weights that is pruned at each task, p in the paper; in [0, 1).
        tasks: how many tasks it remembers.
        retrains: whether what it lets move are the weights of the task after those; else the free ones.
        owners: of every weight that masks protect, uint8, of its shape.

    Raises:
        BecameError: if the share is not in its range.
    """

    share: float = setting(0.5, option="packnet_share")
    tasks: int = static(default=0)
    retrains: bool = static(default=False)
    owners: Params = field(default_factory=dict)

    alone: ClassVar[str] = "masks protect every weight that is in use"
    stages: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.share < 1:
            raise BecameError(f"PackNet prunes a share of {self.share}; it must be at least 0 and below 1.")

    def project(self, updates: Params) -> Params:
        """Return the updates, zero for each weight that must stand still; the others, and other parameters', as are."""
        return {name: self._project(name, update) for name, update in updates.items()}

    def _project(self, name: str, update: Array) -> Array:
        if name not in self.owners:
            return update
        xp = namespace(update=update, owner=self.owners[name])
        moves = self.owners[name] == (self.tasks + 1 if self.retrains else 0)
        return xp.where(moves, update, xp.zeros_like(update))

    @property
    def rank(self) -> dict[str, tuple[int, int]]:
        """For each weight, how many of its entries are a task's, and how many there are: the capacity used."""
        found = {}
        for name, owner in self.owners.items():
            xp: Any = namespace(owner=owner)
            found[name] = (int(xp.count_nonzero(owner)), math.prod(owner.shape))
        return found

    def between_stages(self, theta: Params, projectable: frozenset[str]) -> tuple[Self, Params]:
        """Return the memory in which the next task has its weights, and all parameters, the pruned weights being 0.

        Args:
            theta: after the task was trained in the free weights.
            projectable: names of the weights that masks protect; the others are left as they are.

        Raises:
            BecameError: if there are more tasks than owners can tell apart.
        """
        if self.tasks >= MOST_TASKS:
            raise BecameError(f"PackNet's masks tell {MOST_TASKS} tasks apart; there is one more.")
        owners, weights = {}, dict(theta)
        for name in sorted(projectable):
            weight = theta[name]
            xp: Any = namespace(weight=weight)
            owner = self.owners.get(name)
            if owner is None:
                owner = xp.zeros_like(weight, dtype=xp.uint8)
            taken = _largest(weight, owner == 0, self.share)
            owners[name] = xp.where(taken, xp.zeros_like(owner) + (self.tasks + 1), owner)
            weights[name] = xp.where(owners[name] > 0, weight, xp.zeros_like(weight))
        return replace(self, owners=owners, retrains=True), weights

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task, whose weights stand still from now on."""
        return replace(self, tasks=self.tasks + 1, retrains=False)

    def view(self, task: int) -> "MaskedView":
        """Return the weights that a task, counted from 0, sees."""
        return MaskedView(self.owners, task + 1)

    def to_arrays(self) -> dict[str, Array]:
        """Return the owners, the number of tasks, and whether the next one is being retrained."""
        arrays = {f"owners.{name}": owner for name, owner in self.owners.items()}
        return arrays | {"tasks": integers(self.tasks, arrays), "retrains": integers(int(self.retrains), arrays)}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return a memory of the same share with what ``to_arrays`` gave.

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
    """The weights of the first so many tasks alone.

    Attributes:
        owners: of every weight that masks protect.
        latest: the number of the last task, from 1, whose weights are seen.
    """

    owners: Params
    latest: int = static()

    @property
    def weights(self) -> frozenset[str]:
        """The names of the weights that masks protect."""
        return frozenset(self.owners)

    def effective(self, theta: Params) -> Params:
        """Return the weights, zero where they are free or a later task's.

        Raises:
            BecameError: if a weight is missing.
        """
        result = dict(theta)
        for name, owner in self.owners.items():
            if name not in theta:
                raise BecameError(f"the weights lack '{name}', which has a mask.")
            xp = namespace(weight=theta[name], owner=owner)
            seen = (owner > 0) & (owner <= self.latest)
            result[name] = xp.where(seen, theta[name], xp.zeros_like(theta[name]))
        return result


def _largest(weight: Array, free: Array, share: float) -> Array:
    """Which of the free entries are left when this share of them, those of the smallest magnitude, is pruned."""
    xp: Any = namespace(weight=weight)
    pruned = int(share * int(xp.count_nonzero(free)))
    # Entries that are not free come last, in the order of magnitudes; of equal ones, the first are pruned.
    magnitude = xp.where(free, xp.abs(weight), xp.zeros_like(weight) + math.inf)
    place = xp.argsort(xp.argsort(xp.reshape(magnitude, (-1,))))
    return free & xp.reshape(place >= pruned, weight.shape)
