"""The base classes ``Projector``, ``View`` and ``Region``, and what a projector may ask about a task.

A projector is a frozen dataclass that inherits from ``Projector``. It must define how updates are projected, how a
finished task is remembered, and how its memory is written to arrays and read from them. Everything else that a method
can do to a run is a hook of the same class, which does nothing by default: preparing for the network, choosing the
region that a task is trained in, acting between two stages and at the end of a stage, and choosing the weights that a
task's network works with.

Convention: a weight of any shape is the matrix [d_out, d_in] of its flattened trailing axes, and directions lie in its
input space. Names are those of the weights, such as ``conv1.weight``. Gram matrices are means. Tasks count from 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np

from became_core.arrays import Array, Params, device, namespace
from became_core.projection.sample_gradients import Products

__all__ = ["FinishedTask", "Projector", "Region", "TaskStart", "View", "compact", "full", "integers"]


class FinishedTask(Protocol):
    """What a projector may ask about a task that is finished; what it does not ask for is never computed."""

    def input_grams(self) -> Params:
        """Return, for each weight that can be protected, the mean over samples and positions of a a^T, [d_in, d_in].

        a is an input of the layer. If there are only n < d_in inputs, a factor F [n, d_in] may be returned instead,
        with F^T F the mean. Of an embedding in a loop of a user's own, whose inputs are one-hot vectors, it is the
        diagonal alone, [size].
        """

    def gradient_grams(self) -> Params:
        """Return, for each weight that can be protected, the mean over batches of G^T G, [d_in, d_in].

        G [d_out, d_in] is the gradient of a batch's mean loss, without dropout, and with the batch statistics of
        normalisation layers as constants. It is the mean of the samples' own gradients, which do not exist otherwise.
        """

    def logit_gradients(self, count: int) -> Iterator[Mapping[str, Array | Products]]:
        """Yield the gradients of the true class's logit at single samples, batch by batch.

        Args:
            count: how many samples there are in all, at most.

        Yields:
            For each shared parameter, an array [samples, *parameter shape], or the factors of such gradients.
        """


class TaskStart(Protocol):
    """What a projector may ask about a task that begins; what it does not ask for is never computed."""

    @property
    def index(self) -> int:
        """The task's number."""

    @property
    def weights(self) -> Params:
        """The network's parameters as the task begins."""

    @property
    def projectable(self) -> frozenset[str]:
        """Names of the shared weights that taps describe as matrices and that some stage changes."""

    @property
    def heads(self) -> Sequence[frozenset[str]]:
        """For each task, the names of the parameters that are its own."""

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the generator of random numbers that belongs to the run's seed, the purpose and the task."""

    def gradients(self) -> Params:
        """Return the gradient of the task's mean loss by every projectable weight, at ``weights``.

        There is no dropout, and batch statistics of normalisation layers are constants.
        """

    def input_grams(self) -> Params:
        """Return the Gram matrices of ``FinishedTask.input_grams``, of the new task's inputs at ``weights``."""

    def inputs(self, theta: Params) -> Params:
        """Return each layer's inputs for a few samples at other weights, [samples, positions, d_in], by weight."""


class View(ABC):
    """The effective weights that a task's network works with.

    They are linear in the weights that all tasks share, unless the view is a region that is absorbed.
    """

    @property
    @abstractmethod
    def weights(self) -> frozenset[str]:
        """Names of the weights whose effective values differ from the shared ones."""

    @abstractmethod
    def effective(self, theta: Params) -> Params:
        """Return all parameters, with the effective weights in the place of the shared ones."""


class Region(View):
    """A view with trainable scales: its effective weights are computed from the shared weights and the scales."""

    anneals: ClassVar[bool] = False
    """Whether the region changes from step to step of an epoch, by ``annealed``."""

    scales: Params
    """What is trained beside the weights; no key is the name of a parameter."""

    absorbed: ClassVar[bool] = False
    """Whether the effective weights become the shared ones when the stage ends; then the region's shared weights stand
    still in the stage, penalties are on the effective weights, and the effective weights need not be linear."""

    @abstractmethod
    def with_scales(self, scales: Params) -> Self:
        """Return the region with other scales."""

    @abstractmethod
    def pull_back(self, gradients: Params, theta: Params) -> Params:
        """Return gradients by shared weights and scales, from those by effective weights.

        Args:
            gradients: by name; the gradient of a weight outside the region is returned as it is.
            theta: the shared weights, of at least the region's names.
        """

    @property
    def projected_as(self) -> Mapping[str, str]:
        """The scales whose rows lie in a weight's input space, by key, with the weight as which they are projected."""
        return {}

    def curvature_bounds(self, curvature: Params) -> Params:
        """Return upper bounds of the curvature by the scales, of a function with this diagonal by effective weights.

        An absorbed region has one of the shape of each scale: a penalty's steps are stable by it.
        """
        return {}

    def annealed(self, progress: float) -> Self:
        """Return the region for one step of an epoch; it is called before every step if ``anneals`` is true.

        Args:
            progress: 0 at the first step of the epoch, 1 at the last.
        """
        return self

    @property
    def rowwise(self) -> frozenset[str]:
        """The names of the weights for which the region only changes the layer's inputs.

        For such a weight, the effective weight times a is the shared weight times ``inputs_beneath(name, a)``.
        """
        return frozenset()

    def inputs_beneath(self, name: str, rows: Array) -> Array:
        """Return the rows that the shared weight is multiplied with when the layer's inputs are rows [..., d_in]."""
        return rows

    def without(self, weights: frozenset[str]) -> Self:
        """Return the region without these weights, all of which are in ``rowwise``."""
        return self


class Projector(ABC):
    """A memory of old tasks that projects updates. It is frozen: ``remember`` returns a new one."""

    alone: ClassVar[str] = ""
    """Why the projector cannot be combined with a method or another projector; empty if it can."""

    needs_own_heads: ClassVar[str] = ""
    """Why every task must have a head of its own; empty if tasks may share one."""

    needs_labels: ClassVar[str] = ""
    """Why targets must be labels; empty if they may be numbers."""

    no_adapters: ClassVar[str] = ""
    """Why the weights cannot learn through low-rank adapters; empty if they can."""

    own_rank: ClassVar[int] = 0
    """The rank of the low-rank adapters that the projector trains in if a run names none; 0 if it needs no adapters."""

    trains_rows: ClassVar[bool] = True
    """Whether A of low-rank adapters is trained in the first stage; if not, B alone is."""

    stages: ClassVar[int] = 1
    """How many stages the projector trains a task in, 1 or 2; ``between_stages`` is called between two stages."""

    retraining_rate: float = 1.0
    """What the learning rate of the second of a projector's own two stages is multiplied by."""

    protects_all: ClassVar[bool] = False
    """Whether every shared parameter is protected; if not, only matrices are, and the rest is frozen or penalised."""

    @abstractmethod
    def project(self, updates: Params) -> Params:
        """Return the updates without their part in the protected space; an unprotected weight's update is unchanged."""

    @abstractmethod
    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task."""

    @property
    @abstractmethod
    def rank(self) -> Mapping[str, tuple[int, int]]:
        """For each protected space, its dimension and the dimension of the space that it lies in.

        A direction that is protected in part counts by that part, and the sum is rounded down.
        """

    @abstractmethod
    def to_arrays(self) -> dict[str, Array]:
        """Return the whole memory, without the settings, as arrays by flat names, for a checkpoint."""

    @abstractmethod
    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return a projector with the same settings and the memory that ``to_arrays`` returned."""

    @property
    def rowwise(self) -> frozenset[str]:
        """The names of the weights whose projection is ``project_rows`` of each row, and nothing else."""
        return frozenset()

    def project_rows(self, name: str, rows: Array) -> Array:
        """Return rows of a layer's inputs, [n, d_in], without their part in the protected space of its weight.

        The weight gradient of a linear layer is g^T a. For a weight that ``rowwise`` names, projecting the inputs a of
        a batch gives the same update as projecting the product, at a fraction of the work.
        """
        return rows

    def removed_factor(self, name: str) -> Array | None:
        """Return F [d_in, k] if rows of a weight are projected to rows - rows F F^T and by nothing else; None if not.

        A framework that can add a product to an array in place may then do so, without an array of the weight's size.
        """
        return None

    def unprotected_penalty(self) -> float:
        """Return the strength of the quadratic penalty on shared parameters that are no matrices; 0 freezes them."""
        return 0.0

    def prepare(self, start: TaskStart) -> Self:
        """Return the projector with all that it must know about the network.

        It is called when any task begins, and once more before the run begins or goes on, so that a network that it
        refuses is refused before anything is done.
        """
        return self

    def begin_task(self, start: TaskStart) -> Region | None:
        """Return the region that a new task is trained in, with its first scales; None trains the shared weights."""
        return None

    def adapter_rows(self, start: TaskStart, drawn: Params) -> Params:
        """Return the rows A, [r, d_in] by weight, with which low-rank adapters of a new task begin.

        They are the drawn rows without their part in the protected space. What is left of a row is given the row's
        length again, so that B learns as fast as without the projector; a row that lies in the protected space is 0.

        Args:
            start: the task that begins.
            drawn: rows that were drawn at random, by weight.
        """
        rows = {}
        for name, projected in self.project(drawn).items():
            xp: Any = namespace(rows=projected)
            before, after = (xp.sqrt(xp.sum(it * it, axis=1, keepdims=True)) for it in (drawn[name], projected))
            # What is so small is as much rounding as remainder, and would be made large.
            is_zero = after <= before * float(xp.finfo(projected.dtype).eps) ** 0.5
            ratio = before / xp.where(is_zero, xp.ones_like(after), after)
            rows[name] = projected * xp.where(is_zero, xp.zeros_like(after), ratio)
        return rows

    def between_stages(self, theta: Params, projectable: frozenset[str]) -> tuple[Self, Params]:
        """Return the memory and the parameters with which the second of two stages begins.

        Args:
            theta: all parameters at the end of the first stage.
            projectable: names of the shared weights that taps describe as matrices.
        """
        return self, theta

    def end_stage(self, task: int, region: Region | None) -> Self:
        """Return the memory at the end of a stage.

        Args:
            task: the task's number.
            region: the region that the stage was trained in, with its trained scales; None if it was in none.
        """
        return self

    def region(self, task: int) -> Region | None:
        """Return the region in which a task is trained and measured after its first stage; None if it has none."""
        return None

    def view(self, task: int) -> View | None:
        """Return the view in which a task is evaluated; None evaluates it with the shared weights."""
        return self.region(task)


P = TypeVar("P", bound=Projector)


def full(projector: Projector) -> frozenset[str]:
    """Return the names of the spaces that are protected as a whole, so that every update in them is exactly zero."""
    return frozenset(name for name, (rank, width) in projector.rank.items() if rank >= width)


def compact(projector: P) -> P:
    """Return a projector whose arrays are contiguous in memory, in the order of their axes.

    An array that was read from a file is contiguous, while a slice or a transpose need not be. The layout does not
    change the numbers of an array, but it changes how products with it are rounded. Without this, a run that is resumed
    from a file would differ from one that was not interrupted.
    """
    arrays = {}
    for name, array in projector.to_arrays().items():
        xp = namespace(array=array)
        # Flattening an array that is not contiguous copies it in the order of its axes.
        arrays[name] = xp.reshape(xp.reshape(array, (-1,)), array.shape)
    return projector.with_arrays(arrays)


def integers(numbers: int | Sequence[int], arrays: Params) -> Array:
    """Return an integer, or a sequence of integers, as an int32 array.

    It has the framework and the device of the first of the other arrays; it is a NumPy array if there are none.
    """
    numbers = numbers if isinstance(numbers, int) else list(numbers)
    for array in arrays.values():
        xp = namespace(array=array)
        return xp.asarray(numbers, dtype=xp.int32, device=device(array))
    return np.asarray(numbers, dtype=np.int32)
