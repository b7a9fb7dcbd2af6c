"""What every projector is: a frozen memory of the old tasks that keeps updates out of the space they use.

Convention: a weight of any shape is the matrix [d_out, d_in] of its flattened trailing axes, and directions live in
its input space; names are those of the weights (``conv1.weight``). Gram matrices are means.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np

from became_core.arrays import Array, Params, device, namespace

__all__ = ["FinishedTask", "Projector", "Region", "View", "compact", "full", "integers"]


class FinishedTask(Protocol):
    """What a finished task offers to be remembered by; what no projector asks for is never computed."""

    def input_grams(self) -> Params:
        """Return, for each weight that can be protected, the mean over samples and positions of a a^T, [d_in, d_in].

        Or, of n < d_in inputs, a factor F [n, d_in] of it, the mean being F^T F.
        """

    def gradient_grams(self) -> Params:
        """Return, for each such weight, the mean over batches of G^T G, [d_in, d_in].

        G [d_out, d_in] is the gradient of a batch's mean loss.
        """

    def logit_gradients(self, count: int) -> Iterator[Params]:
        """Yield batches of so many samples' gradients of the true class's logit, in all at most ``count`` of them.

        Each leaf is [samples, *parameter shape]; all shared parameters have one.
        """


class Projector(Protocol):
    """A frozen value; ``remember`` returns a new one."""

    def project(self, updates: Params) -> Params:
        """Return the updates without their part in the protected space; a weight it knows nothing of is unchanged."""

    def project_rows(self, name: str, rows: Array) -> Array:
        """Return rows of a layer's inputs, [n, d_in], without their part in that weight's protected space.

        The weight gradient of a linear layer is g^T a, so projecting the batch's a instead of the product gives the
        same update at a fraction of the work; for the weights that ``rowwise`` names.
        """

    @property
    def rowwise(self) -> frozenset[str]:
        """Names of the weights for which ``project_rows`` is all of the projection."""

    @property
    def protects_all(self) -> bool:
        """Whether every shared parameter is protected; otherwise matrix weights alone are, and the rest must freeze."""

    def remember(self, statistics: FinishedTask) -> Self:
        """Return the memory with one more task."""

    @property
    def rank(self) -> Mapping[str, tuple[int, int]]:
        """For each protected space, its dimension and that of the space it lies in.

        Directions that are protected in part count by their part, and the sum is rounded down.
        """

    def to_arrays(self) -> dict[str, Array]:
        """Return the whole memory, settings aside, as arrays by flat names, for a checkpoint."""

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return a projector of the same settings with the memory that ``to_arrays`` gave."""


class View(Protocol):
    """What a task's network sees of the weights that all tasks share: effective weights of its own, linear in them."""

    @property
    def weights(self) -> frozenset[str]:
        """Names of the weights that it sees otherwise than they are."""

    def effective(self, theta: Params) -> Params:
        """Return the weights that the task's network works with."""


class Region(View, Protocol):
    """A view that is learned: effective weights by the shared ones beneath and by scales of the task's own."""

    @property
    def scales(self) -> Params:
        """What is trained with the weights, by keys that are no parameter's name."""

    @property
    def anneals(self) -> bool:
        """Whether it changes from step to step of an epoch."""

    def annealed(self, progress: float) -> Self:
        """Return the region at a step of an epoch, from 0 at the first to 1 at the last."""

    def with_scales(self, scales: Params) -> Self:
        """Return the region with other scales."""

    def pull_back(self, gradients: Params, theta: Params) -> Params:
        """Return gradients by weights and scales, given those by effective weights and the weights beneath."""


P = TypeVar("P", bound=Projector)


def full(projector: Projector) -> frozenset[str]:
    """Return the names of the spaces that are protected whole: updates in them are exactly zero."""
    return frozenset(name for name, (rank, width) in projector.rank.items() if rank >= width)


def compact(projector: P) -> P:
    """Return a projector whose arrays lie in memory in the order of their axes, as they do when a file gives them back.

    How an array lies does not change its numbers, but it changes the rounding of products with it.
    """
    arrays = {}
    for name, array in projector.to_arrays().items():
        xp = namespace(array=array)
        arrays[name] = xp.reshape(xp.reshape(array, (-1,)), array.shape)
    return projector.with_arrays(arrays)


def integers(numbers: int | Sequence[int], arrays: Params) -> Array:
    """Return counts as an array, of the framework and on the device of other arrays, if there are any."""
    numbers = numbers if isinstance(numbers, int) else list(numbers)
    for array in arrays.values():
        xp = namespace(array=array)
        return xp.asarray(numbers, dtype=xp.int32, device=device(array))
    return np.asarray(numbers, dtype=np.int32)
