"""What the checks of learners share: networks, a stream, steps, directions, and numbers in NumPy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.networks import (
    Architecture,
    AveragePool,
    Backbone,
    Convolution,
    Flatten,
    Linear,
    Mask,
    Parameter,
    Residual,
    Tanh,
)
from became_core.arrays import Params, device, namespace
from became_core.continual import (
    SGD,
    Annealed,
    Batch,
    Constraint,
    EpochEnd,
    Learner,
    Optimiser,
    Task,
    TaskEnd,
    TaskStream,
    Training,
)
from became_core.continual.measurement import Measurement
from became_core.curvature import (
    input_grams,
)
from became_core.projection import UnitGraph
from became_core.projection.unit_graph import find_unit_graph
from reference.formulas import cross_entropy
from tests.backends import to_numpy
from tests.streams import prototype_stream

__all__ = [
    "BACKBONES",
    "RATE",
    "STEP",
    "STREAM",
    "Make",
    "Said",
    "convolutional",
    "direction_of",
    "everything",
    "fresh_rng",
    "in_the_framework_of",
    "input_grams_of",
    "linear",
    "listened",
    "loss_at",
    "moved",
    "numbers",
    "step",
    "unit_graph_of",
]

Make = Callable[[TaskStream, int], Learner]
STREAM = prototype_stream(tasks=2, classes_per_task=3, per_class=16, side=8)
RATE = 0.125
STEP = 1e-6  # of finite differences: so small that hardly any ReLU changes sides


def linear(stream: TaskStream) -> Architecture:
    return Architecture((Flatten(), Linear("fc1", 9, bias=True), Tanh()), stream.dataset.images.shape[1:])


def convolutional(stream: TaskStream) -> Architecture:
    """With a residual block, and one whose shortcut changes the shape.

    The blocks' weights have one shape, because JAX compiles each operation of curvature and projection for each shape.
    """
    block = Convolution("conv2", 4, 3, padding=1, bias=True), Tanh()
    layers = (
        *(Convolution("conv1", 4, 3, stride=2, padding=1), Tanh(), Residual(block)),
        *(Residual((Convolution("conv3", 4, 3, 2, padding=1), Tanh()), (Convolution("shortcut", 4, 1, stride=2),)),),
        *(AveragePool(2), Flatten(), Linear("fc1", 7, bias=True)),
    )
    return Architecture(layers, stream.dataset.images.shape[1:])


@dataclass(frozen=True)
class Own:
    """A user's own backbone, which is no description: the product of two layers of the same pixels."""

    pixels: int

    @property
    def tapped(self) -> tuple[Linear, Linear]:
        return Linear("left", 8, bias=True), Linear("right", 8)

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        left, right = (layer.parameters((self.pixels,)) for layer in self.tapped)
        return left | right

    @property
    def masks(self) -> tuple[Mask, ...]:
        return ()

    def __call__(self, run: Any, images: Any) -> Any:
        flat = run(Flatten(), images)
        left, right = (run(layer, flat) for layer in self.tapped)
        return left * right


BACKBONES: dict[str, Callable[[TaskStream], Backbone]] = {
    "linear": linear,
    "convolutional": convolutional,
    "own": lambda stream: Own(stream.dataset.images[0].size),
}


def numbers(tree: Params) -> dict[str, NDArray[Any]]:
    """Copies of a learner's arrays, in NumPy."""
    return {name: np.array(to_numpy(value)) for name, value in tree.items()}


def fresh_rng() -> np.random.Generator:
    return np.random.default_rng(7)


def everything(learner: Learner) -> Constraint:
    return Constraint(trainable=frozenset(learner.parameters()))


def step(
    learner: Learner, constraint: Constraint, *, optimiser: Optimiser | None = None, task: int = 0, steps: int = 1
) -> float:
    """One step on the first samples of a task, or several; returns the mean loss."""
    batch = Batch(task, STREAM.tasks[task].train[:12])
    theta = learner.parameters()
    begun = (optimiser or SGD()).initial({name: theta[name] for name in constraint.trainable})
    return learner.train([batch] * steps, np.full(steps, RATE), constraint, begun, fresh_rng()).loss


def loss_at(learner: Learner, parameters: Params, task: int = 0) -> float:
    """The mean loss of those samples at other parameters; the learner's own are put back."""
    before = learner.parameters()
    learner.assign(parameters)
    rows = STREAM.tasks[task].train[:12]
    logits = to_numpy(learner.logits(rows, 12))[:, task].astype(np.float64)
    learner.assign(before)
    return cross_entropy(logits, STREAM.targets[rows])


def direction_of(learner: Learner, size: float = 0.1) -> Params:
    """A direction in the framework's own arrays: the first task's parameters, each rescaled and shifted."""
    shifts = np.random.default_rng(3)
    return {
        name: value * 0 if name in learner.heads[1] else size * (value + float(shifts.normal()))
        for name, value in learner.parameters().items()
    }


def in_the_framework_of(like: Any, values: NDArray[np.float64]) -> Any:
    """Numbers as an array of the framework, dtype and device of another."""
    xp = namespace(like=like)
    return xp.asarray(values, dtype=like.dtype, device=device(like))


def moved(parameters: Params, direction: Params, by: float) -> Params:
    return {name: value + by * direction[name] for name, value in parameters.items()}


Said = list[list[list[NDArray[Any]]]]


def listened(learner: Any, stream: TaskStream) -> tuple[Said, Callable[[EpochEnd | TaskEnd], None]]:
    """Let a learner be heard; return what it says, and the observer that a run must be given.

    At every task's end, of each task so far, all its head's logits of its test samples that evaluation asked for, in
    order; the last one with the task's own mask, if that is the last task.
    """
    said: Said = []
    heard: list[tuple[bytes, dict[int, NDArray[Any]]]] = []
    speak = learner.logits

    def logits(indices: NDArray[np.int64], batch_size: int, heads: slice = slice(None)) -> Any:
        found = speak(indices, batch_size, heads)
        asked_for = range(len(stream.tasks))[heads]
        heard.append((indices.tobytes(), dict(zip(asked_for, np.moveaxis(to_numpy(found), 1, 0).copy(), strict=True))))
        return found

    def observe(event: EpochEnd | TaskEnd) -> None:
        if isinstance(event, TaskEnd):
            seen = stream.tasks[: event.task + 1]
            said.append(
                [[of[t.index] for rows, of in heard if rows == t.test.tobytes() and t.index in of] for t in seen]
            )
        heard.clear()

    learner.logits = logits
    return said, observe


def input_grams_of(learner: Learner) -> Params:
    """The Gram matrices of what the protected layers see of the first samples."""
    taps = learner.taps(0, STREAM.tasks[0].train[:12], 12, "empirical", fresh_rng())
    return input_grams(taps, learner.projectable)


def unit_graph_of(learner: Learner, task: Task) -> UnitGraph:
    """Which layers' units each of a learner's layers sees."""
    training = Training(Annealed(0.1, 1), Annealed(0.1, 1))
    return find_unit_graph(Measurement(learner, task, training, "empirical", 0, "start"))
