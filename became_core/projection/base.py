"""What every projector is: a frozen memory of the old tasks that keeps updates out of the space they use.

A projector is a frozen dataclass below ``Projector``. It must say how updates are projected, how a finished task is
remembered, and how its memory goes to a disk. Everything else that a method can do to a run is a hook of the same
class, with a default that does nothing: what it must find out about the network, which region a task is trained in,
what happens between two stages of its own and at a stage's end, and which weights a task's network sees.

Convention: a weight of any shape is the matrix [d_out, d_in] of its flattened trailing axes, and directions live in
its input space; names are those of the weights (``conv1.weight``). Gram matrices are means. Tasks count from 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np

from became_core.arrays import Array, Params, device, namespace

__all__ = ["FinishedTask", "Projector", "Region", "TaskStart", "View", "compact", "full", "integers"]


class FinishedTask(Protocol):
    """What a finished task offers to be remembered by; what no projector asks for is never computed."""

    def input_grams(self) -> Params:
        """Return, for each weight that can be protected, the mean over samples and positions of a a^T, [d_in, d_in].

        Where there are fewer than d_in inputs a, n of them, it may be a factor F [n, d_in], the mean being F^T F.
        """

    def gradient_grams(self) -> Params:
        """Return, for each such weight, the mean over batches of G^T G, [d_in, d_in].

        G [d_out, d_in] is the gradient of a batch's mean loss.
        """

    def logit_gradients(self, count: int) -> Iterator[Params]:
        """Yield batches of single samples' gradients of the true class's logit, at most ``count`` samples in all.

        Each leaf is [samples, *parameter shape]; all shared parameters have one.
        """


class TaskStart(Protocol):
    """What a projector may ask about a task before it is trained; what none asks for is never computed."""

    @property
    def index(self) -> int:
        """The task's number."""

    @property
    def weights(self) -> Params:
        """The network's parameters as the task begins."""

    @property
    def projectable(self) -> frozenset[str]:
        """Names of the shared weights that taps describe as matrices."""

    @property
    def heads(self) -> Sequence[frozenset[str]]:
        """For each task, the names of the parameters that are its own."""

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the generator of random numbers that belongs to the run's seed, the purpose and the task."""

    def gradients(self) -> Params:
        """Return the gradient of the task's mean loss by every projectable weight, at these weights."""

    def inputs(self, theta: Params) -> Params:
        """Return what each layer sees of a few samples at other weights: [samples, positions, d_in] by weight."""


class View(ABC):
    """What a task's network sees of the weights that all tasks share: effective weights of its own, linear in them."""

    @property
    @abstractmethod
    def weights(self) -> frozenset[str]:
        """Names of the weights whose effective values differ from the shared ones."""

    @abstractmethod
    def effective(self, theta: Params) -> Params:
        """Return all parameters, with the weights that the task's network works with in their places."""


class Region(View):
    """A view that is learned: effective weights are made of the shared weights and of scales of the task's own."""

    anneals: ClassVar[bool] = False

    scales: Params
    """What is trained beside the weights, by keys that are no parameter's name."""

    @abstractmethod
    def with_scales(self, scales: Params) -> Self:
        """Return the region with other scales."""

    @abstractmethod
    def pull_back(self, gradients: Params, theta: Params) -> Params:
        """Return gradients by shared weights and scales, given those by effective weights.

        Args:
            gradients: by name; those of weights outside the region are returned as they are.
            theta: the shared weights, of at least the region's names.
        """

    def annealed(self, progress: float) -> Self:
        """Return the region at a step of an epoch, from 0 at the first to 1 at the last, where ``anneals`` is set."""
        return self

    @property
    def rowwise(self) -> frozenset[str]:
        """Names of weights whose effective value on rows a is the shared weight on ``inputs_beneath(name, a)``."""
        return frozenset()

    def inputs_beneath(self, name: str, rows: Array) -> Array:
        """Return what the shared weight is multiplied with where the layer sees rows [..., d_in]."""
        return rows

    def without(self, weights: frozenset[str]) -> Self:
        """Return the region of the other weights alone; the weights left out are among ``rowwise``."""
        return self


class Projector(ABC):
    """A frozen value; ``remember`` returns a new one. Subclasses are frozen dataclasses."""

    alone: ClassVar[str] = ""
    """Why the projector cannot be combined with a method or another projector; it can if this is empty."""

    stages: ClassVar[int] = 1
    """How many stages the projector itself trains a task in; ``between_stages`` is called between the two of 2."""

    protects_all: ClassVar[bool] = False
    """Whether every shared parameter is protected; otherwise only matrices are, and the rest is frozen or penalised."""

    @abstractmethod
    def project(self, updates: Params) -> Params:
        """Return the updates without their part in the protected space; a weight it knows nothing of is unchanged."""

    @abstractmethod
    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task."""

    @property
    @abstractmethod
    def rank(self) -> Mapping[str, tuple[int, int]]:
        """For each protected space, its dimension and that of the space it lies in.

        Directions that are protected in part count by their part, and the sum is rounded down.
        """

    @abstractmethod
    def to_arrays(self) -> dict[str, Array]:
        """Return the whole memory, settings aside, as arrays by flat names, for a checkpoint."""

    @abstractmethod
    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return a projector of the same settings with the memory that ``to_arrays`` returned."""

    @property
    def rowwise(self) -> frozenset[str]:
        """Names of the weights for which ``project_rows`` is all of the projection."""
        return frozenset()

    def project_rows(self, name: str, rows: Array) -> Array:
        """Return rows of a layer's inputs, [n, d_in], without their part in that weight's protected space.

        The weight gradient of a linear layer is g^T a, so projecting the batch's a instead of the product gives the
        same update at a fraction of the work; for the weights that ``rowwise`` names.
        """
        return rows

    def unprotected_penalty(self) -> float:
        """Return the strength of the quadratic penalty on shared parameters that are no matrices; 0 freezes them."""
        return 0.0

    def prepare(self, start: TaskStart) -> Self:
        """Return the projector once it has found out about the network what it must know; called at every task."""
        return self

    def begin_task(self, start: TaskStart) -> Region | None:
        """Return the region that a new task is trained in, with the scales it begins with; none for plain weights."""
        return None

    def between_stages(self, theta: Params, projectable: frozenset[str]) -> tuple[Self, Params]:
        """Return the memory and the parameters that the second of two stages begins with.

        Args:
            theta: all parameters at the end of the first stage.
            projectable: names of the shared weights that taps describe as matrices.
        """
        return self, theta

    def end_stage(self, task: int, region: Region | None) -> Self:
        """Return the memory at the end of a stage, with what it keeps of the region that the task was trained in."""
        return self

    def region(self, task: int) -> Region | None:
        """Return the region that a task keeps for good: its later stages and measurements are done in it."""
        return None

    def view(self, task: int) -> View | None:
        """Return what a task's network sees of the weights when it is evaluated; None for the weights as they are."""
        return self.region(task)


P = TypeVar("P", bound=Projector)


def full(projector: Projector) -> frozenset[str]:
    """Return the names of the spaces that are protected whole: updates in them are exactly zero."""
    return frozenset(name for name, (rank, width) in projector.rank.items() if rank >= width)


def compact(projector: P) -> P:
    """Return a projector whose arrays lie in memory in the order of their axes, as they do when read from a file.

    An array's layout does not change its numbers, but it changes the rounding of products with it; so a run that is
    resumed from a file would else differ from one that was not interrupted.
    """
    arrays = {}
    for name, array in projector.to_arrays().items():
        xp = namespace(array=array)
        arrays[name] = xp.reshape(xp.reshape(array, (-1,)), array.shape)
    return projector.with_arrays(arrays)


def integers(numbers: int | Sequence[int], arrays: Params) -> Array:
    """Return counts as an int32 array, of the framework and on the device of other arrays, if there are any."""
    numbers = numbers if isinstance(numbers, int) else list(numbers)
    for array in arrays.values():
        xp = namespace(array=array)
        return xp.asarray(numbers, dtype=xp.int32, device=device(array))
    return np.asarray(numbers, dtype=np.int32)
