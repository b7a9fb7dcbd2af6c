"""Which layers' units each layer of a network sees: what gating units asks of it, and how it is found out by trying.

Setting some of a layer's units to zero changes those same units, and no others, in what the layers after it see. What
changes further on, although no layer between looks at those units any more, sees them too: residual connections let
several layers reach one. Where all layers that reach one are cut off, nothing may be left of those units. A
normalisation over several units lets something through, and such a network is refused.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from became_core.arrays import Array, Params, device, namespace
from became_core.errors import BecameError
from became_core.projection.base import TaskStart

__all__ = ["UnitGraph", "find_unit_graph"]

# What is below this share of the largest input is rounding.
SLACK = 1e-5


@dataclass(frozen=True)
class UnitGraph:
    """Layers, by the names of their weights, and the layers whose units they see.

    Units that reach one layer from several layers are added up, unit by unit, as residual connections do.

    Attributes:
        layers: the shared ones, in the order of the network.
        sources: of each of them, and of the heads at last, the layers whose units it sees; none where it sees the
            network's inputs.
        heads: the weight of each task's head.
    """

    layers: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    heads: tuple[str, ...]

    def readers(self, task: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the layers that see others' units, in order, a task's head the last of them; and whose they see."""
        for name, sources in zip([*self.layers, self.heads[task]], self.sources, strict=True):
            if sources:
                yield name, sources

    def readers_of(self, layer: str, task: int) -> list[str]:
        """Return the layers that see a layer's units, a task's head among them."""
        return [name for name, sources in self.readers(task) if layer in sources]


def find_unit_graph(start: TaskStart) -> UnitGraph:
    """Return which layers' units each of a network's layers sees.

    Args:
        start: of the task with whose head, and with some of whose samples, the network is tried.

    Raises:
        BecameError: if a layer does not see others' units one by one.
    """
    theta = start.weights
    layers = tuple(name for name in theta if name in start.projectable)
    heads = tuple(min(head, key=lambda name: len(theta[name].shape) != 2) for head in start.heads)
    readers = [*layers, heads[start.index]]
    sources: dict[str, list[str]] = {name: [] for name in readers}
    for place, name in enumerate(layers):
        cut = theta | _without_units(theta, [name], 2)
        blind: Params = {}  # the weights of readers that no longer look at the units that are cut off
        whole, part = start.inputs(theta), start.inputs(cut)
        for reader in readers[place + 1 :]:
            change = part[reader] - whole[reader]
            if not _differs(change, whole[reader]):
                continue
            if _differs(_units(change, theta[name], cut=False), whole[reader]):
                raise _refusal(reader, name)
            sources[reader].append(name)
            blind[reader] = _blinded(theta[reader], theta[name])
            whole, part = (start.inputs(weights | blind) for weights in (theta, cut))
        if not blind:
            raise BecameError(f"HAT gates units, and no layer sees those of '{name}'; choose another network.")
    for place, (reader, names) in enumerate(sources.items()):
        for step in (1, 2):
            if names:
                inputs = start.inputs(theta | _without_units(theta, names, step))[reader]
                rest = _units(inputs - inputs[:1, ...], theta[names[0]], cut=True, step=step)
            else:  # the reader sees the network's own inputs, which no layer may change
                inputs = start.inputs(theta | _without_units(theta, readers[:place], step))[reader]
                rest = inputs - start.inputs(theta)[reader]
            if _differs(rest, inputs):
                raise _refusal(reader, names[-1] if names else readers[0])
    return UnitGraph(layers, tuple(map(tuple, sources.values())), heads)


def _refusal(reader: str, name: str) -> BecameError:
    return BecameError(
        f"HAT gates units, and '{reader}' does not see those of '{name}' one by one, and nothing else; "
        "choose another method or network."
    )


def _without_units(theta: Params, names: Iterable[str], step: int) -> Params:
    """Return these weights with zeros for every unit whose number ``step`` divides."""
    weights = {}
    for name in names:
        weight = theta[name]
        xp: Any = namespace(weight=weight)
        silent = xp.reshape(_every(weight, step), (-1,) + (1,) * (len(weight.shape) - 1))
        weights[name] = xp.where(silent, xp.zeros_like(weight), weight)
    return weights


def _blinded(reader: Array, weight: Array) -> Array:
    """Return a reader's weight, zero where it looks at every second unit of another layer."""
    xp: Any = namespace(reader=reader)
    matrix = xp.reshape(reader, (1, int(reader.shape[0]), -1))
    return xp.reshape(matrix - _units(matrix, weight, cut=True), reader.shape)


def _units(change: Array, weight: Array, *, cut: bool, step: int = 2) -> Array:
    """Return a change [samples, positions, d_in] of what is seen of a layer's units, zero but at those cut, or not."""
    xp: Any = namespace(change=change)
    units = int(weight.shape[0])
    if change.shape[2] % units:
        return change
    silent = xp.reshape(_every(weight, step), (1, 1, units, 1))
    by_unit = xp.reshape(change, (change.shape[0], change.shape[1], units, -1))
    zero = xp.zeros_like(by_unit)
    chosen = xp.where(silent, by_unit, zero) if cut else xp.where(silent, zero, by_unit)
    return xp.reshape(chosen, change.shape)


def _differs(change: Array, inputs: Array) -> bool:
    """Whether a change is more than rounding."""
    xp: Any = namespace(change=change)
    return math.prod(change.shape) > 0 and bool(xp.max(xp.abs(change)) > SLACK * xp.max(xp.abs(inputs)))


def _every(weight: Array, step: int) -> Array:
    """Which units' numbers a step divides, bool [units]."""
    xp: Any = namespace(weight=weight)
    return xp.asarray([unit % step == 0 for unit in range(int(weight.shape[0]))], device=device(weight))
