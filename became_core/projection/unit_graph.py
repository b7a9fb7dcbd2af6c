"""Which layers' units each layer of a network reads, found by setting units to zero and looking at the layers' inputs.

HAT needs to know this, and a learner offers each layer's inputs at any weights. For every layer, in the order of the
network, every second unit is set to zero. A later layer whose inputs change reads these units, and its inputs may
change in these units alone. Its weight is then blinded: the columns of these units are set to zero, so that the change
does not pass through it. A layer behind it whose inputs change nevertheless reads the units directly as well, through a
residual connection.

At the end, all layers that a reader reads are set to zero at once, and nothing may be left of the units in its inputs.
A normalisation over several units fails this test, and such a network is refused.

Convention: unit i of a layer is row i of its weight; units are set to zero by zero rows.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from became_core.arrays import Array, Params, device, namespace
from became_core.errors import BecameError
from became_core.projection.base import TaskStart

__all__ = ["UnitGraph", "find_unit_graph"]

# A change of inputs up to this share of the largest input is rounding.
SLACK = 1e-5


@dataclass(frozen=True)
class UnitGraph:
    """Layers, by the names of their weights, and the layers whose units each of them reads.

    If a layer reads several layers, it reads the sum of their units, unit by unit, as residual connections make it.

    Attributes:
        layers: the shared layers, in the order of the network.
        sources: for each of the layers, and for the heads at the end, the layers whose units it reads; empty if it
            reads the network's inputs.
        heads: the weight of each task's head.
    """

    layers: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    heads: tuple[str, ...]

    def readers(self, task: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield each layer that reads units, with the layers that it reads; a task's head comes last."""
        for name, sources in zip([*self.layers, self.heads[task]], self.sources, strict=True):
            if sources:
                yield name, sources

    def readers_of(self, layer: str, task: int) -> list[str]:
        """Return the layers that read a layer's units, a task's head among them."""
        return [name for name, sources in self.readers(task) if layer in sources]


def find_unit_graph(start: TaskStart) -> UnitGraph:
    """Return which layers' units each layer of a network reads.

    Args:
        start: the task with whose head and samples the network is tried.

    Raises:
        BecameError: if a layer does not read the units of other layers one by one.
    """
    theta = start.weights
    layers = tuple(name for name in theta if name in start.projectable)
    heads = tuple(min(head, key=lambda name: len(theta[name].shape) != 2) for head in start.heads)
    readers = [*layers, heads[start.index]]
    sources: dict[str, list[str]] = {name: [] for name in readers}
    for position, name in enumerate(layers):
        cut = theta | _without_units(theta, [name], 2)
        blinded: Params = {}  # the weights of the readers so far, with zeros where they read the units that are cut
        whole_inputs, cut_inputs = start.inputs(theta), start.inputs(cut)
        for reader in readers[position + 1 :]:
            change = cut_inputs[reader] - whole_inputs[reader]
            if not _differs(change, whole_inputs[reader]):
                continue
            if _differs(_units(change, theta[name], cut=False), whole_inputs[reader]):
                raise _refusal(reader, name)
            sources[reader].append(name)
            blinded[reader] = _blinded(theta[reader], theta[name])
            whole_inputs, cut_inputs = (start.inputs(weights | blinded) for weights in (theta, cut))
        if not blinded:
            raise BecameError(f"HAT gates units, and no layer reads the units of '{name}'; choose another network.")
    for position, (reader, names) in enumerate(sources.items()):
        # With step 2 every second unit is zero, with step 1 every unit.
        for step in (1, 2):
            if names:
                # Samples are compared with the first one, because a bias may leave a constant in a unit that is cut.
                inputs = start.inputs(theta | _without_units(theta, names, step))[reader]
                rest = _units(inputs - inputs[:1, ...], theta[names[0]], cut=True, step=step)
            else:  # It reads the network's own inputs, which no layer may change.
                inputs = start.inputs(theta | _without_units(theta, readers[:position], step))[reader]
                rest = inputs - start.inputs(theta)[reader]
            if _differs(rest, inputs):
                raise _refusal(reader, names[-1] if names else readers[0])
    return UnitGraph(layers, tuple(map(tuple, sources.values())), heads)


def _refusal(reader: str, name: str) -> BecameError:
    return BecameError(
        f"HAT gates units, and '{reader}' does not read those of '{name}' one by one; choose another method or network."
    )


def _without_units(theta: Params, names: Iterable[str], step: int) -> Params:
    """Return these weights with zero rows for every unit whose number is divisible by ``step``."""
    weights = {}
    for name in names:
        weight = theta[name]
        xp: Any = namespace(weight=weight)
        is_cut = xp.reshape(_is_cut(weight, step), (-1,) + (1,) * (len(weight.shape) - 1))
        weights[name] = xp.where(is_cut, xp.zeros_like(weight), weight)
    return weights


def _blinded(reader: Array, weight: Array) -> Array:
    """Return a reader's weight with zero columns for every second unit of another layer's weight."""
    xp: Any = namespace(reader=reader)
    matrix = xp.reshape(reader, (1, int(reader.shape[0]), -1))
    return xp.reshape(matrix - _units(matrix, weight, cut=True), reader.shape)


def _units(change: Array, weight: Array, *, cut: bool, step: int = 2) -> Array:
    """Return a change of inputs with zeros for all units but those that are cut, or for all but those that are not.

    Args:
        change: [samples, positions, d_in]; a change whose d_in is no multiple of the number of units is returned as it
            is, and so counts as a change that is not in the units.
        weight: the weight of the layer whose units are cut.
        cut: whether the units that are cut are returned; else the others.
        step: a unit is cut if its number is divisible by this.
    """
    xp: Any = namespace(change=change)
    units = int(weight.shape[0])
    if change.shape[2] % units:
        return change
    is_cut = xp.reshape(_is_cut(weight, step), (1, 1, units, 1))
    by_unit = xp.reshape(change, (change.shape[0], change.shape[1], units, -1))
    zero = xp.zeros_like(by_unit)
    chosen = xp.where(is_cut, by_unit, zero) if cut else xp.where(is_cut, zero, by_unit)
    return xp.reshape(chosen, change.shape)


def _differs(change: Array, inputs: Array) -> bool:
    """Return whether a change of inputs is more than rounding."""
    xp: Any = namespace(change=change)
    return math.prod(change.shape) > 0 and bool(xp.max(xp.abs(change)) > SLACK * xp.max(xp.abs(inputs)))


def _is_cut(weight: Array, step: int) -> Array:
    """Return which units of a weight have a number that ``step`` divides, bool [units]."""
    xp: Any = namespace(weight=weight)
    return xp.asarray([unit % step == 0 for unit in range(int(weight.shape[0]))], device=device(weight))
