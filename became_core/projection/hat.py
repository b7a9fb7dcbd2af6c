"""HAT, hard attention to the task (Serra, Suris, Miron & Karatzoglou, ICML 2018, arXiv 1801.01423).

Every task t has a gate a = sigmoid(s e) for each unit that a layer reads, and learns its embedding e:

    network     h_l <- a_l h_l: the column of unit i in the weight that reads it is multiplied by a_l,i     (eq. 1)
    annealing   s = 1 / s_max + (s_max - 1 / s_max) (b - 1) / (B - 1) in batch b of B of an epoch           (eq. 3)
    weights     g_l,ij <- (1 - min(A_l,i, A_l-1,j)) g_l,ij, A being the largest gate of all old tasks       (eq. 2)
    embedding   q <- s_max (cosh(s e) + 1) / (s (cosh(e) + 1)) q for its gradient q, which makes
                dL/de = dL/da s_max sigmoid'(e)                                                             (eq. 4)
    capacity    loss + c sum a (1 - A) / sum (1 - A)                                                        (eq. 5)

When a task is evaluated, its gates are open, 1, where e > 0, and closed, 0, elsewhere. The weights between two open
units of an old task do not move, and the closed gates keep all other units out. Later tasks therefore do not change an
old task's outputs, to the bit. Running statistics of normalisation layers, if the network has them, are not weights:
later tasks do change them.

Residual connections add up the units of several layers. Each layer that reads the sum has gates of its own. A unit is
in use, A_l,i = 1, if the gate of any of its readers is open; then it is in use in all layers that the sum is made of.

What differs: in A, the gates of old tasks are 0 or 1, while the published code has sigmoid(s_max e), which is nearly
the same. The gradient of the embedding is computed in its closed form, which cannot overflow and so needs no clamp; the
embedding of a gate that is nearly 0 or 1 therefore goes on moving. In the published code it stops: the derivative of a
single-precision sigmoid is 0 where the gate has been rounded to 1, and |s e| is clamped at 50 in eq. 4. With
``clamped`` it is as published. Where s is 194 or more, the two gradients differ by 1.6 to 4.5 of their norm.
Biases and normalisation, which read no units, are frozen after the first task.

Convention: a layer's name is that of its weight [d_out, d_in], where d_in is units x positions and the positions of one
unit are side by side. The key of a gate has the name of the weight that reads the units.
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

    The memory is the gates of the old tasks. A weight between two units that old tasks use does not move.

    Attributes:
        sharpness: how steep the gates become within an epoch, s_max in the paper; above 1.
        sparsity: the weight of the cost of units in use, beside the mean loss, c in the paper; at least 0.
        clamped: whether the embedding of a gate that is nearly 0 or 1 stops moving, by the clamps and the rounding of
            the published code; without it, the gradient has its closed form everywhere.
        tasks: how many tasks the memory has.
        unit_graph: the layers whose units each layer reads; None until the network is known.
        gates: the open gates of a task, bool [units]. The key has the weight that reads the units and the task, such as
            ``conv2.weight@0``.

    Raises:
        BecameError: if a number cannot be used.
    """

    sharpness: float = setting(400.0, option="hat_sharpness")
    sparsity: float = setting(0.75, option="hat_sparsity")
    clamped: bool = setting(False, option="hat_clamped")
    tasks: int = static(default=0)
    unit_graph: UnitGraph | None = static(default=None)
    gates: Params = field(default_factory=dict)

    no_adapters: ClassVar[str] = (
        "its gates say for single weights between units which may change, and factors change all at once"
    )
    alone: ClassVar[str] = "gates protect every unit that is in use"
    needs_own_heads: ClassVar[str] = (
        "a task works behind gates of its own, and a head that later tasks train would no longer fit what these let "
        "through"
    )

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.sharpness <= 1 or self.sparsity < 0:
            raise BecameError(
                f"HAT has a sharpness of {self.sharpness} and a sparsity of {self.sparsity}; "
                "give above 1 and at least 0."
            )

    def project(self, updates: Params) -> Params:
        """Return the updates, set to zero for every weight between two units that old tasks use."""
        return {name: self._project(name, update) for name, update in updates.items()}

    def _project(self, name: str, update: Array) -> Array:
        if self.unit_graph is None or name not in self.unit_graph.layers or not self.tasks:
            return update
        xp: Any = namespace(update=update)
        frozen = self._frozen(name, update.shape[0], math.prod(update.shape[1:]))
        return xp.where(xp.reshape(frozen, update.shape), xp.zeros_like(update), update)

    def _frozen(self, name: str, rows: int, columns: int) -> Array:
        """Return which entries of a layer's weight may not move, bool [d_out, d_in]."""
        outputs, inputs = self.used(name), self._used_inputs(name)
        xp: Any = namespace(gates=outputs)
        if inputs is None:  # all of the network's inputs are in use
            return xp.broadcast_to(outputs[:, None], (rows, columns))
        return outputs[:, None] & spread(inputs, columns)[None, :]

    def used(self, name: str) -> Array:
        """Return which units of a layer any old task uses, in any of the layers that read them, bool [units]."""
        graph = self._graph
        keys = [f"{reader}@{task}" for task in range(self.tasks) for reader in graph.readers_of(name, task)]
        return _any([self.gates[key] for key in keys])

    def _used_inputs(self, name: str) -> Array | None:
        """Return which of the units that a layer reads any old task uses; None if it reads the network's inputs."""
        keys = [f"{name}@{task}" for task in range(self.tasks)]
        return _any([self.gates[key] for key in keys]) if keys[0] in self.gates else None

    @property
    def _graph(self) -> UnitGraph:
        assert self.unit_graph is not None, "HAT.prepare has not been called"
        return self.unit_graph

    def prepare(self, start: TaskStart) -> Self:
        """Return the projector with the unit graph of the network, which the first call finds.

        Raises:
            BecameError: if a layer of the network does not read the units of other layers one by one, or it has no
                layer to gate.
        """
        if not start.projectable:
            raise BecameError(
                "HAT gates linear and convolutional layers, and the network has none; choose another method."
            )
        return self if self.unit_graph is not None else replace(self, unit_graph=find_unit_graph(start))

    @property
    def rank(self) -> dict[str, tuple[int, int]]:
        """For each layer, how many pairs of an output and an input unit are both in use, and how many pairs there are.

        The inputs of the network count as one unit, which is in use.
        """
        pairs = {}
        for name in self._graph.layers if self.tasks else ():
            outputs, inputs = _counts(self.used(name)), _counts(self._used_inputs(name))
            pairs[name] = (outputs[0] * inputs[0], outputs[1] * inputs[1])
        return pairs

    def begin_task(self, start: TaskStart) -> GatedRegion:
        """Return the region of a new task, with embeddings drawn from a standard normal distribution."""
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
                unused[key] = unused[key] - xp.astype(self._used_before(reader), weight.dtype)
        steepness = filled(embeddings, self.sharpness)
        return GatedRegion(embeddings, unused, steepness, self.sharpness, self.sparsity, self.clamped)

    def _used_before(self, reader: str) -> Array:
        """Return which of the units that a layer reads any old task uses; a new head counts the old heads' gates."""
        heads = self._graph.heads
        keys = [f"{heads[task] if reader in heads else reader}@{task}" for task in range(self.tasks)]
        return _any([self.gates[key] for key in keys])

    def end_stage(self, task: int, region: Region | None) -> Self:
        """Return the memory with the gates of the new task, which do not change afterwards."""
        assert region is not None
        readers = [reader for reader, _ in self._graph.readers(self.tasks)]
        gates = {f"{reader}@{self.tasks}": region.scales[f"{reader}@gates"] > 0 for reader in readers}
        return replace(self, gates=self.gates | gates, tasks=self.tasks + 1)

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory as it is: a task is remembered by its gates alone, and ``end_stage`` has added them."""
        return self

    def view(self, task: int) -> GatedView:
        """Return the effective weights of a learned task, with its gates open or closed."""
        return GatedView({reader: self.gates[f"{reader}@{task}"] for reader, _ in self._graph.readers(task)})

    def to_arrays(self) -> dict[str, Array]:
        """Return the gates, and the number of tasks."""
        arrays = {f"gates.{key}": gate for key, gate in self.gates.items()}
        return arrays | {"tasks": integers(self.tasks, arrays)}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return a projector with the same settings and network, and the memory that ``to_arrays`` returned.

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
    """Return where any of several gates is open, bool [units]."""
    total = gates[0]
    for gate in gates[1:]:
        total = total | gate
    return total


def _counts(gate: Array | None) -> tuple[int, int]:
    """Return how many gates are open, and how many there are; (1, 1) for the network's inputs, which have none."""
    if gate is None:
        return 1, 1
    xp: Any = namespace(gate=gate)
    return int(xp.count_nonzero(gate)), int(gate.shape[0])
