"""HAT, hard attention to the task (Serra, Suris, Miron & Karatzoglou, ICML 2018, arXiv 1801.01423).

A task t has a gate for every unit that a layer sees, a = sigmoid(s e), with an embedding e that it learns:

    network     h_l <- a_l h_l: column i of the weight that sees unit i is scaled by a_l,i                 (eq. 1)
    annealing   s = 1 / s_max + (s_max - 1 / s_max) (b - 1) / (B - 1) in batch b of B of an epoch        (eq. 3)
    weights     g_l,ij <- (1 - min(A_l,i, A_l-1,j)) g_l,ij, A the gates of all old tasks together          (eq. 2)
    embedding   q <- s_max (cosh(s e) + 1) / (s (cosh(e) + 1)) q, which makes dL/de = dL/da s_max sigmoid'(e) (eq. 4)
    capacity    loss + c sum a (1 - A) / sum (1 - A)                                                       (eq. 5)

In testing, a gate is open where e > 0. So an old task's open units have weights of which none moves between them, and
what other units send reaches them no more: later tasks do not change what it says, to the bit. (Running statistics of a
network's normalisation, if it has them, are no weights: later tasks move them.)

Where residual connections add up the units of several layers, each of the layers that see the sum has gates of its own;
a unit is in use where any of its readers' gates is open, A_l,i, and so are the weights of all layers that it adds up.

What differs: gates of old tasks are 0 or 1 in A too, where the published code keeps sigmoid(s_max e), nearly so; the
embedding's gradient is written in its closed form, which needs no clamp against overflow; and biases and normalisation,
which have no input units, are frozen after the first task.

Convention: layers are called by their weights [d_out, d_in]; d_in is units x places, a unit's places side by side.
Gates go by the weight that sees them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np

from became_core.arrays import Array, Params, device, namespace, pytree, static
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask, Projector, Region, TaskStart, integers
from became_core.projection.gates import GatedRegion, GatedView, filled, spread
from became_core.projection.unit_graph import UnitGraph, find_unit_graph
from became_core.registry import setting

__all__ = ["HAT"]


@pytree
@dataclass(frozen=True)
class HAT(Projector):
    """Hard attention to the task: gates of units, learned with the weights that no old task uses (Serra 2018).

    The memory is the gates of the old tasks; no weight moves between two units that one of them uses.

    Attributes:
        sharpness: how steep the gates become within an epoch, s_max in the paper; above 1.
        sparsity: what the units that a task uses cost beside a mean loss, c in the paper; at least 0.
        tasks: how many tasks it remembers.
        unit_graph: which layers' units each layer sees; None until the network is known.
        gates: which of the units that a weight sees a task uses, bool [units]; ``conv2.weight@0`` for weight and task.

    Raises:
        BecameError: if a number cannot be used.
    """

    sharpness: float = setting(400.0, option="hat_sharpness")
    sparsity: float = setting(0.75, option="hat_sparsity")
    tasks: int = static(default=0)
    unit_graph: UnitGraph | None = static(default=None)
    gates: Params = field(default_factory=dict)

    alone: ClassVar[str] = "gates protect every unit that is in use"

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
        if self.unit_graph is None or name not in self.unit_graph.layers or not self.tasks:
            return update
        xp: Any = namespace(update=update)
        still = self._still(name, update.shape[0], math.prod(update.shape[1:]))
        return xp.where(xp.reshape(still, update.shape), xp.zeros_like(update), update)

    def _still(self, name: str, rows: int, columns: int) -> Array:
        """Which entries of a layer's weight stand still, [d_out, d_in]."""
        to, seen = self.used(name), self._seen(name)
        xp: Any = namespace(gates=to)
        if seen is None:  # all of the network's inputs are in use
            return xp.broadcast_to(to[:, None], (rows, columns))
        return to[:, None] & spread(seen, columns)[None, :]

    def used(self, name: str) -> Array:
        """Return which units of a layer any old task uses, through any of its readers, bool [units]."""
        graph = self._graph
        keys = [f"{r}@{task}" for task in range(self.tasks) for r in graph.readers_of(name, task)]
        return _any([self.gates[key] for key in keys])

    def _seen(self, name: str) -> Array | None:
        """Which of the units that a layer sees any old task uses; None where it sees the network's inputs."""
        keys = [f"{name}@{task}" for task in range(self.tasks)]
        return _any([self.gates[key] for key in keys]) if keys[0] in self.gates else None

    @property
    def _graph(self) -> UnitGraph:
        assert self.unit_graph is not None, "HAT.prepare has not been called"
        return self.unit_graph

    def prepare(self, start: TaskStart) -> Self:
        """Return the projector with the network's unit graph, which is found at the first call.

        Raises:
            BecameError: if a layer of the network does not see others' units one by one.
        """
        return self if self.unit_graph is not None else replace(self, unit_graph=find_unit_graph(start))

    @property
    def rank(self) -> dict[str, tuple[int, int]]:
        """For each layer but the first, how many pairs of units stand still, and how many there are; of it, units."""
        found = {}
        for name in self._graph.layers if self.tasks else ():
            to, seen = _counts(self.used(name)), _counts(self._seen(name))
            found[name] = (to[0] * seen[0], to[1] * seen[1])
        return found

    def begin_task(self, start: TaskStart) -> GatedRegion:
        """Return the region of a new task, its embeddings drawn from a standard normal distribution, layer by layer."""
        theta, rng = start.weights, start.rng("gates")
        embeddings, unused = {}, {}
        for reader, sources in self._graph.readers(self.tasks):
            weight = theta[sources[0]]
            xp: Any = namespace(weight=weight)
            drawn = np.asarray(rng.standard_normal(int(weight.shape[0])))
            key = f"{reader}@gates"
            embeddings[key] = xp.asarray(drawn, dtype=weight.dtype, device=device(weight))
            unused[key] = xp.ones_like(embeddings[key])
            if self.tasks:
                unused[key] = unused[key] - xp.astype(self._seen_before(reader), weight.dtype)
        return GatedRegion(embeddings, unused, filled(embeddings, self.sharpness), self.sharpness, self.sparsity)

    def _seen_before(self, reader: str) -> Array:
        """Which of the units that a new task's reader sees any old task uses: for a head, through any old head."""
        heads = self._graph.heads
        keys = [f"{heads[task] if reader in heads else reader}@{task}" for task in range(self.tasks)]
        return _any([self.gates[key] for key in keys])

    def end_stage(self, task: int, region: Region | None) -> Self:
        """Return the memory with the new task's gates, which do not change from now on."""
        assert region is not None
        readers = [reader for reader, _ in self._graph.readers(self.tasks)]
        gates = {f"{reader}@{self.tasks}": region.scales[f"{reader}@gates"] > 0 for reader in readers}
        return replace(self, gates=self.gates | gates, tasks=self.tasks + 1)

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory: a task is remembered by its gates alone, and ``end_stage`` has kept them."""
        return self

    def view(self, task: int) -> GatedView:
        """Return the weights that a task, counted from 0, works with."""
        return GatedView({reader: self.gates[f"{reader}@{task}"] for reader, _ in self._graph.readers(task)})

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


def _any(gates: Sequence[Array]) -> Array:
    """Where any of several gates is open."""
    total = gates[0]
    for gate in gates[1:]:
        total = total | gate
    return total


def _counts(gate: Array | None) -> tuple[int, int]:
    """How many units are open, and how many there are; the network's inputs count as one, in use."""
    if gate is None:
        return 1, 1
    xp: Any = namespace(gate=gate)
    return int(xp.count_nonzero(gate)), int(gate.shape[0])
