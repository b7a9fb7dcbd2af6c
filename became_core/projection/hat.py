"""HAT, hard attention to the task (Serra, Suris, Miron & Karatzoglou, ICML 2018, arXiv 1801.01423).

A task t has a gate for every unit of every layer but the last, a = sigmoid(s e), with an embedding e that it learns:

    network     h_l <- a_l h_l: column i of the next layer's weight is scaled by a_l,i                    (eq. 1)
    annealing   s = 1 / s_max + (s_max - 1 / s_max) (b - 1) / (B - 1) in batch b of B of an epoch        (eq. 3)
    weights     g_l,ij <- (1 - min(A_l,i, A_l-1,j)) g_l,ij, A the gates of all old tasks together          (eq. 2)
    embedding   q <- s_max (cosh(s e) + 1) / (s (cosh(e) + 1)) q, which makes dL/de = dL/da s_max sigmoid'(e) (eq. 4)
    capacity    loss + c sum a (1 - A) / sum (1 - A)                                                       (eq. 5)

In testing, a gate is open where e > 0. So an old task's open units have weights of which none moves between them, and
what other units send reaches them no more: later tasks do not change what it says, to the bit. (Running statistics of a
network's normalisation, if it has them, are no weights: later tasks move them.)

What differs: gates of old tasks are 0 or 1 in A too, where the published code keeps sigmoid(s_max e), nearly so; the
embedding's gradient is written in its closed form, which needs no clamp against overflow; and biases and normalisation,
which have no input units, are frozen after the first task.

Convention: layers are called by their weights [d_out, d_in]; d_in is units x places, a unit's places side by side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np

from became_core.arrays import Array, Params, device, namespace, pytree, static
from became_core.errors import BecameError
from became_core.projection.base import Statistics, integers
from became_core.projection.gates import GatedRegion, GatedView, filled, spread

__all__ = ["HAT"]


@pytree
@dataclass(frozen=True)
class HAT:
    """The gates of the old tasks; as a projector, it lets no weight move between two units that one of them uses.

    Attributes:
        sharpness: s_max.
        sparsity: c.
        tasks: how many tasks it remembers.
        order: the layers, each of which sees the units of the one before; empty until the network is known.
        heads: the weight of each task's head, which sees the units of the last layer.
        gates: which units of a layer a task uses, bool [units]; ``conv1.weight@0`` for layer and task.

    Raises:
        BecameError: if a number cannot be used.
    """

    sharpness: float = static(default=400.0)
    sparsity: float = static(default=0.75)
    tasks: int = static(default=0)
    order: tuple[str, ...] = static(default=())
    heads: tuple[str, ...] = static(default=())
    gates: Params = field(default_factory=dict)

    protects_all: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.sharpness <= 1 or self.sparsity < 0:
            raise BecameError(
                f"HAT has a sharpness of {self.sharpness} and a sparsity of {self.sparsity}; "
                "give above 1 and at least 0."
            )

    def project(self, updates: Params) -> Params:
        """Return the updates, zero between units that old tasks use; the others, and other parameters', as they are."""
        return {name: self._project(name, update) for name, update in updates.items()}

    def _project(self, name: str, update: Array) -> Array:
        if name not in self.order or not self.gates:
            return update
        xp: Any = namespace(update=update)
        still = self._still(name, update.shape[0], math.prod(update.shape[1:]))
        return xp.where(xp.reshape(still, update.shape), xp.zeros_like(update), update)

    def _still(self, name: str, rows: int, columns: int) -> Array:
        """Which entries of a layer's weight stand still, [d_out, d_in]."""
        to = self.used(name)
        xp: Any = namespace(gates=to)
        place = self.order.index(name)
        if not place:  # all of the network's inputs are in use
            return xp.broadcast_to(to[:, None], (rows, columns))
        return to[:, None] & spread(self.used(self.order[place - 1]), columns)[None, :]

    def used(self, name: str) -> Array:
        """Return which units of a layer any old task uses, bool [units]."""
        found = [self.gates[f"{name}@{task}"] for task in range(self.tasks) if f"{name}@{task}" in self.gates]
        total = found[0]
        for gate in found[1:]:
            total = total | gate
        return total

    def project_rows(self, name: str, rows: Array) -> Array:
        """Return the rows: what stands still is no subspace of a layer's input."""
        return rows

    @property
    def rowwise(self) -> frozenset[str]:
        """None."""
        return frozenset()

    @property
    def rank(self) -> dict[str, tuple[int, int]]:
        """For each layer but the first, how many pairs of units stand still, and how many there are; of it, units."""
        found, before = {}, (1, 1)
        for name in self.order if self.gates else ():
            used = self.used(name)
            xp: Any = namespace(used=used)
            units = (int(xp.count_nonzero(used)), int(used.shape[0]))
            found[name] = (before[0] * units[0], before[1] * units[1])
            before = units
        return found

    def region(self, theta: Params, stream: np.random.Generator) -> GatedRegion:
        """Return the region of a new task, its embeddings drawn from a standard normal distribution.

        Args:
            theta: the parameters, whose framework, device and dtype the embeddings have.
            stream: what they are drawn from, layer by layer.
        """
        embeddings, unused = {}, {}
        for name, consumer in zip(self.order, self._consumers(self.tasks), strict=True):
            weight = theta[name]
            xp: Any = namespace(weight=weight)
            drawn = np.asarray(stream.standard_normal(int(weight.shape[0])))
            key = f"{consumer}@gates"
            embeddings[key] = xp.asarray(drawn, dtype=weight.dtype, device=device(weight))
            unused[key] = xp.ones_like(embeddings[key])
            if self.gates:
                unused[key] = unused[key] - xp.astype(self.used(name), weight.dtype)
        return GatedRegion(embeddings, unused, filled(embeddings, self.sharpness), self.sharpness, self.sparsity)

    def settled(self, region: GatedRegion) -> Self:
        """Return the memory with the new task's gates, which do not change from now on."""
        gates = {}
        for name, consumer in zip(self.order, self._consumers(self.tasks), strict=True):
            gates[f"{name}@{self.tasks}"] = region.scales[f"{consumer}@gates"] > 0
        return replace(self, gates=self.gates | gates, tasks=self.tasks + 1)

    def remember(self, statistics: Statistics) -> Self:
        """Return the memory: a task's gates are all that it is remembered by, and ``settled`` has kept them."""
        return self

    def view(self, task: int) -> GatedView:
        """Return the weights that a task, counted from 0, works with."""
        consumers = self._consumers(task)
        gates = {c: self.gates[f"{name}@{task}"] for name, c in zip(self.order, consumers, strict=True)}
        return GatedView(gates)

    def _consumers(self, task: int) -> Sequence[str]:
        """The weights that see the units of each layer."""
        return [*self.order[1:], self.heads[task]] if self.order else []

    def to_arrays(self) -> dict[str, Array]:
        """Return the gates, and the number of tasks."""
        arrays = {f"gates.{key}": gate for key, gate in self.gates.items()}
        return arrays | {"tasks": integers(self.tasks, arrays)}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return a memory of the same settings and network with what ``to_arrays`` gave.

        Raises:
            BecameError: if an array is no part of such a memory, or there is no number of tasks.
        """
        for key in arrays:
            if key != "tasks" and not key.startswith("gates."):
                raise BecameError(f"the array '{key}' is no part of a memory of HAT.")
        if "tasks" not in arrays:
            raise BecameError("the memory of HAT lacks 'tasks', the number of tasks it remembers.")
        gates = {key.removeprefix("gates."): gate for key, gate in arrays.items() if key != "tasks"}
        return replace(self, tasks=int(arrays["tasks"]), gates=gates)
