"""How what a process has summed over its own batches becomes what all processes have summed over all batches."""

from collections.abc import Callable
from typing import NamedTuple

from became_core.arrays import Array, Params

__all__ = ["Exchange"]


class Exchange(NamedTuple):
    """What processes tell each other; all of them must call it, in the same order.

    Attributes:
        total: the sum over all processes of each array, which every process has by the same name and in the same shape.
        joined: the rows of all processes, one process after the other, [all rows, ...].
    """

    total: Callable[[Params], Params]
    joined: Callable[[Array], Array]
