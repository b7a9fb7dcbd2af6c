"""Whether a network's layers are in a row, each a function of the units of the one before alone, unit by unit.

Found out by trying, whatever the framework: where a layer's units are cut off, nothing of them may be left in what the
next layer sees. A residual connection, or a normalisation over several units, lets something through.
"""

import math
from typing import Any

from became_core.arrays import Array, Params, device, namespace
from became_core.continual.learner import Learner
from became_core.continual.seeding import random_stream
from became_core.continual.stream import Task
from became_core.errors import BecameError

__all__ = ["layers_in_a_row"]

SAMPLES = 8
SLACK = 1e-5


def layers_in_a_row(learner: Learner, task: Task) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a learner's shared weights, in the order of the network, and the weight of every task's head.

    Args:
        learner: which is left with its own weights.
        task: whose head, and some of whose samples, it is tried with.

    Raises:
        BecameError: if the layers are not in a row.
    """
    theta = learner.parameters()
    order = tuple(name for name in theta if name in learner.projectable)
    heads = tuple(min(head, key=lambda name: len(theta[name].shape) != 2) for head in learner.heads)
    try:
        for name, after in zip(order, [*order[1:], heads[task.index]], strict=True):
            units, columns = int(theta[name].shape[0]), math.prod(theta[after].shape[1:])
            if columns % units or any(_leaks(learner, task, theta, name, after, step) for step in (1, 2)):
                raise BecameError(
                    f"HAT gates networks whose layers are in a row: '{after}' does not see the units of '{name}' "
                    "one by one, and nothing else; choose another method or network."
                )
    finally:
        learner.assign(theta)
    return order, heads


def _leaks(learner: Learner, task: Task, theta: Params, name: str, after: str, step: int) -> bool:
    """Whether anything is left of every so-manieth unit of a layer, cut off, in what the next layer sees of it."""
    weight = theta[name]
    xp: Any = namespace(weight=weight)
    units = int(weight.shape[0])
    shape = (units,) + (1,) * (len(weight.shape) - 1)
    cut = xp.reshape(_every(weight, step), shape)
    learner.assign(theta | {name: xp.where(cut, xp.zeros_like(weight), weight)})
    rows = task.train[:SAMPLES]
    (taps,) = learner.taps(task.index, rows, SAMPLES, "empirical", random_stream(0, "in-a-row"))
    inputs = taps[after.removesuffix(".weight")].inputs  # [samples, positions, d_in]
    by_unit = xp.reshape(inputs, (inputs.shape[0], inputs.shape[1], units, -1))
    change = xp.abs(by_unit - by_unit[:1, ...])
    silent = xp.reshape(_every(weight, step), (1, 1, units, 1))
    left = xp.max(xp.where(silent, change, xp.zeros_like(change)))
    return bool(left > SLACK * xp.max(xp.abs(inputs)))


def _every(weight: Array, step: int) -> Array:
    """Every so-manieth unit, bool [units]."""
    xp: Any = namespace(weight=weight)
    return xp.asarray([unit % step == 0 for unit in range(int(weight.shape[0]))], device=device(weight))
