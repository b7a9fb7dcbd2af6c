"""What is measured on a learner at its present weights: accuracies, losses, curvature for merging, Gram matrices.

Convention: accuracies in percent. Task-incremental accuracy chooses among the classes of the sample's task;
class-incremental accuracy among those of all tasks so far, the argmax over all their heads. Everything else is a mean:
over samples for losses and curvature, over samples and positions for the Gram matrices of inputs, over batches for
those of gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from became_core.arrays import Array, Params, namespace
from became_core.continual.data import Indices, Task
from became_core.continual.learner import (
    Learner,
    heads_of,
    refresh_statistics,
    seen_through,
    taps_of_shared_weights,
    weights_of,
)
from became_core.continual.rng import random_generator
from became_core.continual.schedule import Training
from became_core.curvature import (
    TAP_MODES,
    FisherKind,
    Sharing,
    TapMode,
    Taps,
    batch_gradient,
    derivatives_along,
    diagonal_fisher,
    gradient_grams,
    input_grams,
    kronecker_factors,
    log_softmax,
    per_sample_gradients,
)
from became_core.errors import BecameError
from became_core.laplace import Diagonal, Kronecker, Precision, Quadratic
from became_core.projection import Region, View

__all__ = ["Measurement", "Structure", "accuracies", "mean_loss"]

Structure = Literal["diagonal", "kronecker"]
"""How a task's curvature is kept."""

# How many samples a network is tried with when a projector asks what its layers see.
TRIED_SAMPLES = 8


def accuracies(
    learner: Learner, tasks: Sequence[Task], batch_size: int, views: Mapping[int, View] | None = None
) -> tuple[list[float], list[float]]:
    """Return the test accuracies of these tasks: task-incremental, and class-incremental.

    Both come from one pass over each task's test samples, and from one more for every task with a view of its own,
    since its head then works with other weights.

    Args:
        learner: what is scored.
        tasks: all that were seen so far, in order.
        batch_size: of the passes.
        views: what tasks see of the weights, by task number, where they do not see them as they are.

    Raises:
        BecameError: if a task has no test samples.
    """
    for task in tasks:
        if not len(task.test):
            raise BecameError(f"task {task.index + 1} has no test samples to score it on.")
    logits: list[list[Array]] = []  # by task whose samples they are of, and by head: [samples, classes]
    for task in tasks:
        of_all_heads = learner.logits(task.test, batch_size)
        logits.append([of_all_heads[:, head, :] for head in range(len(tasks))])
    for head, view in (views or {}).items():
        with seen_through(learner, view):
            for by_head, task in zip(logits, tasks, strict=True):
                by_head[head] = learner.logits(task.test, batch_size)[:, head, :]
    task_incremental, class_incremental = [], []
    for task, by_head in zip(tasks, logits, strict=True):
        targets = learner.targets(task.test)
        xp = namespace(logits=by_head[0], targets=targets)
        width = int(by_head[0].shape[1])
        among_own = xp.argmax(by_head[task.index], axis=-1)
        among_all = xp.argmax(xp.concat(by_head, axis=1), axis=-1)
        task_incremental.append(_percent(among_own == targets))
        class_incremental.append(_percent(among_all == targets + task.index * width))
    return task_incremental, class_incremental


def _percent(correct: Array) -> float:
    xp = namespace(correct=correct)
    return 100.0 * int(xp.count_nonzero(correct)) / int(correct.shape[0])


def mean_loss(learner: Learner, task: int, indices: Indices, batch_size: int) -> float:
    """Return the mean cross-entropy of a task's head on these samples."""
    logits, targets = learner.logits(indices, batch_size), learner.targets(indices)
    xp = namespace(logits=logits, targets=targets)
    log_p = log_softmax(logits[:, task, :])
    return -float(xp.mean(xp.take_along_axis(log_p, targets[:, None], axis=-1)))


@dataclass(frozen=True)
class Measurement:
    """A task as the learner sees it at its present weights.

    A merging rule asks it about the new task's loss (``LocalLoss``), a projector about a task that begins
    (``TaskStart``) or is finished (``FinishedTask``).

    Attributes:
        learner: whose weights, and whose data.
        task: whose loss.
        training: how many samples are taken, in batches of what size.
        kind: of diagonal Fisher information.
        seed: the run's.
        purpose: "merge" or "posterior", say: with the seed and the task it names the random draws.
        region: the region that the task is learned in, if it is learned in one; the loss is then measured as a function
            of the shared weights.
        last: the task that was learned last, to whose images running statistics belong; the measured one if None.
    """

    learner: Learner
    task: Task
    training: Training
    kind: FisherKind
    seed: int
    purpose: str
    region: Region | None = None
    last: Task | None = None

    def diagonal(self) -> Diagonal:
        """Return the diagonal Fisher information, of the method's kind, over all parameters."""
        rows, parameters = self.curvature_rows(), weights_of(self.learner)
        with seen_through(self.learner, self.region):
            return Diagonal(diagonal_fisher(self._fisher_taps(rows), parameters, self.kind, samples=len(rows)))

    def kronecker(self, sharing: Sharing = "expand") -> Precision:
        """Return Kronecker factors of the curvature for weights and biases, and its diagonal for the rest.

        Args:
            sharing: how a layer's positions are treated, as ``became_core.curvature.kfac`` defines it.

        Raises:
            BecameError: if the method's kind of Fisher information has no factors, which is so of "batch".
        """
        if self.kind == "batch":
            raise BecameError("the kind 'batch' has no Kronecker factors; choose empirical, true or sampled.")
        rows, shapes = self.curvature_rows(), {n: tuple(v.shape) for n, v in self.learner.parameters().items()}
        with seen_through(self.learner, self.region):
            factors, rest = kronecker_factors(self._fisher_taps(rows), samples=len(rows), sharing=sharing)
        parts: list[Precision] = []
        if factors:
            parts.append(Kronecker(factors, shapes={name: shapes[name] for name in factors}))
        if rest:
            parts.append(Diagonal({n: namespace(value=v).reshape(v, shapes[n]) for n, v in rest.items()}))
        return sum(parts[1:], start=parts[0])

    def precision(self, structure: Structure) -> Precision:
        """Return the curvature in that structure: ``diagonal`` or ``kronecker``."""
        return self.diagonal() if structure == "diagonal" else self.kronecker()

    def logit_gradients(self, count: int) -> Iterator[Params]:
        """Yield gradients of the true class's logit at some training samples, a batch at a time.

        Args:
            count: of how many samples; all there are if they are fewer.

        Yields:
            For each shared parameter, that is one of no task's head, an array [samples, *the parameter's shape].
        """
        rows, heads = self._sample("logit-gradients", count), heads_of(self.learner)
        shared = {name: value for name, value in weights_of(self.learner).items() if name not in heads}
        rng = random_generator(self.seed, "logit-gradient-taps", self.task.index)
        size = self.training.batch_size
        batches = self._taps(rows, "logit", rng)
        for start, taps in zip(range(0, len(rows), size), batches, strict=True):
            by_layer, samples = per_sample_gradients(taps), min(size, len(rows) - start)
            gradients: Params = {}
            for name, like in shared.items():
                xp = namespace(parameter=like)
                # A parameter of which no tap speaks takes no part.
                value = by_layer[name] if name in by_layer else xp.stack([xp.zeros_like(like)] * samples)
                gradients[name] = xp.reshape(value, (samples, *like.shape))
            yield gradients

    def _fisher_taps(self, rows: Indices) -> Iterator[Taps]:
        rng = random_generator(self.seed, f"fisher-{self.purpose}", self.task.index)
        return self._taps(rows, TAP_MODES[self.kind], rng)

    def along(self, directions: Sequence[Params], origin: Params | None = None) -> Quadratic:
        """Return the loss along directions from the learner's weights, exact on the samples that curvature takes.

        Given an origin, from there; the learner is left with its own weights. Derivatives take running statistics,
        those that belong to the weights where they are taken, for constants.
        """
        if origin is not None:
            with self.learner.at(origin):
                self._refresh_statistics()
                return self.along(directions)
        rows, size = self.curvature_rows(), self.training.batch_size
        if self.region is not None:  # effective weights are linear in those beneath
            directions = [self.region.effective(direction) for direction in directions]
        if self.learner.running_statistics:
            theta = self.learner.parameters()
            constant = {name: theta[name] * 0 for name in self.learner.running_statistics}
            directions = [direction | constant for direction in directions]
        with seen_through(self.learner, self.region):
            return Quadratic(*derivatives_along(self.learner.pushforward(self.task.index, rows, size, directions)))

    def slope(self, origin: Params, directions: Sequence[Params]) -> Array:
        """Return the loss's slopes along K directions at other weights, [K]."""
        return self.along(directions, origin).slope

    def gradients(self) -> Params:
        """Return the mean loss's gradient by every projectable weight, on the samples that curvature takes.

        Running statistics, if there are any, are estimated first.
        """
        self._refresh_statistics()
        rows, parameters = self.curvature_rows(), self.learner.parameters()
        rng, total = random_generator(self.seed, "gradient-taps", self.task.index), dict[str, Array]()
        with seen_through(self.learner, self.region):
            for taps in self._taps(rows, "empirical", rng):
                for name, value in batch_gradient(taps).items():
                    total[name] = total[name] + value if name in total else value
        projectable = sorted(self.learner.projectable & set(total))
        return {
            name: namespace(total=total[name]).reshape(total[name], parameters[name].shape) / len(rows)
            for name in projectable
        }

    def loss(self) -> float:
        """Return the mean loss on the samples that curvature takes, as in evaluation."""
        with seen_through(self.learner, self.region):
            return mean_loss(self.learner, self.task.index, self.curvature_rows(), self.training.batch_size)

    @property
    def mean(self) -> Params:
        """The learner's weights."""
        return weights_of(self.learner)

    @property
    def index(self) -> int:
        """The task's number."""
        return self.task.index

    @property
    def weights(self) -> Params:
        """All parameters of the learner."""
        return self.learner.parameters()

    @property
    def projectable(self) -> frozenset[str]:
        """Names of the shared weights that taps describe as matrices."""
        return self.learner.projectable

    @property
    def heads(self) -> Sequence[frozenset[str]]:
        """For each task, the names of the parameters that are its own."""
        return self.learner.heads

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the generator of random numbers that belongs to the run's seed, the purpose and the task."""
        return random_generator(self.seed, purpose, self.task.index)

    def inputs(self, theta: Params) -> Params:
        """Return what each layer sees of a few samples at other weights: [samples, positions, d_in] by weight."""
        rows = self.task.train[:TRIED_SAMPLES]
        with self.learner.at(theta):
            batches = self.learner.taps(self.task.index, rows, len(rows), "empirical", random_generator(0, "wiring"))
            (taps,) = batches
            return {f"{layer}.weight": tap.inputs for layer, tap in taps.items()}

    def input_grams(self) -> Params:
        """Return, for each weight that can be protected, the mean of a a^T over a sample of the training images."""
        with seen_through(self.learner, self.region):
            return input_grams(self._projector_taps("inputs"), self.learner.projectable)

    def gradient_grams(self) -> Params:
        """Return, for each such weight, the mean of G^T G over the batches of the same sample."""
        with seen_through(self.learner, self.region):
            return gradient_grams(self._projector_taps("empirical"), self.learner.projectable)

    def _projector_taps(self, mode: TapMode) -> Iterator[Taps]:
        return self._taps(self.projector_rows(), mode, random_generator(self.seed, "projector-taps", self.task.index))

    def projector_rows(self) -> Indices:
        """Return the training rows that projectors remember the task by."""
        return self._sample("projector", self.training.projector_samples)

    def curvature_rows(self) -> Indices:
        """Return the training rows that curvature is measured on, the same for every purpose: ratios share them."""
        return self._sample("curvature", self.training.curvature_samples)

    def _taps(self, rows: Indices, mode: TapMode, rng: np.random.Generator) -> Iterator[Taps]:
        batches = self.learner.taps(self.task.index, rows, self.training.batch_size, mode, rng)
        # A projector remembers what a layer sees, whatever weights it works with.
        return batches if mode == "inputs" else (taps_of_shared_weights(self.region, taps) for taps in batches)

    def _refresh_statistics(self) -> None:
        tasks, size = [self.last or self.task], self.training.batch_size
        refresh_statistics(self.learner, tasks, size, self.seed, self.region)

    def _sample(self, purpose: str, count: int | None) -> Indices:
        if count is None:
            return self.task.train
        return random_generator(self.seed, purpose, self.task.index).permutation(self.task.train)[:count]
