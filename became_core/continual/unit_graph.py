"""Whose units each layer of a network sees, found out by trying, whatever the framework.

Cutting off some of a layer's units changes those same units, and no others, in what its readers see. What changes
further on, though no reader looks at those units any more, sees them too: residual connections let several layers reach
one reader. Where all that reach a reader are cut off, nothing may be left of those units. A normalisation over several
units lets something through, and is refused.
"""

import math
from collections.abc import Iterable
from typing import Any

from became_core.arrays import Array, Params, device, namespace
from became_core.continual.learner import Learner
from became_core.continual.seeding import random_stream
from became_core.continual.stream import Task
from became_core.errors import BecameError
from became_core.projection import UnitGraph

__all__ = ["find_unit_graph"]

SAMPLES = 8
SLACK = 1e-5


def find_unit_graph(learner: Learner, task: Task) -> UnitGraph:
    """Return whose units each of a learner's layers sees.

    Args:
        learner: which is left with its own weights.
        task: whose head, and some of whose samples, it is tried with.

    Raises:
        BecameError: if a layer does not see others' units one by one.
    """
    theta = learner.parameters()
    layers = tuple(name for name in theta if name in learner.projectable)
    heads = tuple(min(head, key=lambda name: len(theta[name].shape) != 2) for head in learner.heads)
    readers = [*layers, heads[task.index]]
    sources: dict[str, list[str]] = {name: [] for name in readers}
    try:
        for place, name in enumerate(layers):
            cut = theta | _cut(theta, [name], 2)
            blind: Params = {}  # readers that do not look at the units that are cut off
            whole, part = _inputs(learner, task, theta), _inputs(learner, task, cut)
            for reader in readers[place + 1 :]:
                change = part[reader] - whole[reader]
                if not _differs(change, whole[reader]):
                    continue
                if _differs(_units(change, theta[name], cut=False), whole[reader]):
                    raise _refusal(reader, name)
                sources[reader].append(name)
                blind[reader] = _blinded(theta[reader], theta[name])
                whole, part = (_inputs(learner, task, each | blind) for each in (theta, cut))
            if not blind:
                raise BecameError(f"HAT gates units, and no layer sees those of '{name}'; choose another network.")
        for place, (reader, found) in enumerate(sources.items()):
            for step in (1, 2):
                if found:
                    inputs = _inputs(learner, task, theta | _cut(theta, found, step))[reader]
                    left = _units(inputs - inputs[:1, ...], theta[found[0]], cut=True, step=step)
                else:  # the network's own inputs, which no layer may change
                    inputs = _inputs(learner, task, theta | _cut(theta, readers[:place], step))[reader]
                    left = inputs - _inputs(learner, task, theta)[reader]
                if _differs(left, inputs):
                    raise _refusal(reader, found[-1] if found else readers[0])
    finally:
        learner.assign(theta)
    return UnitGraph(layers, tuple(map(tuple, sources.values())), heads)


def _refusal(reader: str, name: str) -> BecameError:
    return BecameError(
        f"HAT gates units, and '{reader}' does not see those of '{name}' one by one, and nothing else; "
        "choose another method or network."
    )


def _cut(theta: Params, names: Iterable[str], step: int) -> Params:
    """Return these weights without every so-manieth unit."""
    found = {}
    for name in names:
        weight = theta[name]
        xp: Any = namespace(weight=weight)
        silent = xp.reshape(_every(weight, step), (-1,) + (1,) * (len(weight.shape) - 1))
        found[name] = xp.where(silent, xp.zeros_like(weight), weight)
    return found


def _blinded(reader: Array, weight: Array) -> Array:
    """Return a reader's weight, zero where it looks at every second unit of another."""
    xp: Any = namespace(reader=reader)
    matrix = xp.reshape(reader, (1, int(reader.shape[0]), -1))
    return xp.reshape(matrix - _units(matrix, weight, cut=True), reader.shape)


def _inputs(learner: Learner, task: Task, theta: Params) -> Params:
    """Return what each weight sees of some samples, [samples, positions, d_in]."""
    learner.assign(theta)
    stream = random_stream(0, "wiring")
    (taps,) = learner.taps(task.index, task.train[:SAMPLES], SAMPLES, "empirical", stream)
    return {f"{layer}.weight": tap.inputs for layer, tap in taps.items()}


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
    """Every so-manieth unit, bool [units]."""
    xp: Any = namespace(weight=weight)
    return xp.asarray([unit % step == 0 for unit in range(int(weight.shape[0]))], device=device(weight))
