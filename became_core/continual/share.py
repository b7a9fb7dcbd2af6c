"""What one process does of the work that several share.

The batches of a measurement are shared out whole, in turn, so that a batch has the samples, and batch norm the
statistics, that it has in one process. What each process has summed over its own batches is then summed over all.
Where there are fewer batches than processes, every process does all of them, and nothing is sent.

Convention: every process calls the same functions in the same order, as for all that communicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from became_core.arrays import Array, Params
from became_core.continual.data import Indices
from became_core.curvature import Exchange

__all__ = ["Share"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """A process's share of the work; this class is of a process that works alone, and communicates nothing.

    An adapter overrides ``total`` and ``joined``.

    Attributes:
        rank: the number of this process.
        count: how many processes share the work.

    Examples:
        >>> Share().own(["a", "b", "c"]), Share(1, 2).own(["a", "b", "c"]), Share(1, 4).own(["a", "b", "c"])
        (['a', 'b', 'c'], ['b'], ['a', 'b', 'c'])
    """

    rank: int = 0
    count: int = 1

    def divides(self, parts: int) -> bool:
        """Whether so many parts are shared out, and not done by every process."""
        return 1 < self.count <= parts

    def own(self, parts: Sequence[T]) -> Sequence[T]:
        """Return those of the parts that this process does."""
        return parts[self.rank :: self.count] if self.divides(len(parts)) else parts

    def rows(self, samples: int) -> slice:
        """Return which of a training batch's samples this process has: a run of them, or all if they are too few.

        >>> Share(0, 2).rows(5), Share(1, 2).rows(5)
        (slice(0, 2, None), slice(2, 5, None))
        """
        if not self.divides(samples):
            return slice(None)
        return slice(samples * self.rank // self.count, samples * (self.rank + 1) // self.count)

    def exchange(self, parts: int) -> Exchange | None:
        """Return how sums over this process's own parts become those over all; None if they are those already."""
        return Exchange(self.total, self.joined) if self.divides(parts) else None

    def total(self, sums: Params) -> Params:
        """Return the sum over all processes of each array; every process has arrays of these names and shapes."""
        return sums

    def joined(self, rows: Array, places: Indices | None = None) -> Array:
        """Return the rows of all processes, [all rows, ...].

        Args:
            rows: of this process.
            places: where they are among all; if None, those of each process follow those of the one before it.
        """
        return rows
