"""Measurements of a learner at its present weights: accuracies, losses, curvature, gradients and Gram matrices.

Convention: accuracies are in percent. Task-incremental accuracy predicts among the classes of the sample's task;
class-incremental accuracy predicts among the classes of all tasks so far, by the argmax over all their heads. Losses
and curvature are means over samples, Gram matrices of inputs are means over samples and positions, and Gram matrices of
gradients are means over batches.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from became_core.arrays import Array, Params, device, namespace
from became_core.continual.data import Indices, Task, chunks
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
    Exchange,
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
    per_sample_gradients,
)
from became_core.errors import BecameError
from became_core.laplace import Diagonal, Kronecker, Precision, Quadratic
from became_core.projection import Region, View

__all__ = ["Evaluation", "Measurement", "Structure", "accuracies", "mean_loss"]

Structure = Literal["diagonal", "kronecker"]
"""The structure in which a task's curvature is measured."""

# How many samples the network runs on when a projector asks for its layers' inputs.
TRIED_SAMPLES = 8


class Evaluation(NamedTuple):
    """What a learner reaches on the test samples of some tasks.

    Attributes:
        accuracy: the task-incremental accuracy of each task, in percent; NaN if targets are no labels.
        class_incremental_accuracy: the class-incremental one; that is the task-incremental one if tasks share a head.
        loss: the loss of each task by its own head, in the natural unit of the likelihood and of the data.
    """

    accuracy: list[float]
    class_incremental_accuracy: list[float]
    loss: list[float]


def accuracies(
    learner: Learner, tasks: Sequence[Task], batch_size: int, views: Mapping[int, View] | None = None
) -> Evaluation:
    """Return the test accuracies of these tasks, task-incremental and class-incremental, and their losses.

    There is one pass over the test samples of all tasks for the shared weights, and one for every task that has a view,
    because the head of that task works with other weights.

    For task-incremental accuracy a batch holds samples of one task, as in published code. If the network normalises by
    the statistics of a batch, such a batch tells which task it is of, and class-incremental accuracy would profit from
    it. For that accuracy the samples of all tasks are therefore mixed, in an order that depends on the number of tasks
    alone, and the passes are made once more.

    Args:
        learner: the learner that is scored.
        tasks: all tasks that have been learned, in order.
        batch_size: how many samples a batch has.
        views: the views of those tasks that have one, by task number.

    Raises:
        BecameError: if a task has no test samples.
    """
    for task in tasks:
        if not len(task.test):
            raise BecameError(f"task {task.index + 1} has no test samples to score it on.")
    if learner.shares_head:
        return _by_one_head(learner, tasks, batch_size)
    parts = [task.test for task in tasks]
    logits = mixed = _logits_by_head(learner, parts, len(tasks), batch_size, views or {})
    if learner.mixes_samples and learner.likelihood.has_labels and len(tasks) > 1:
        rows = np.concatenate(parts)
        order = random_generator(0, "mixed-evaluation", len(tasks)).permutation(len(rows))
        (shuffled,) = _logits_by_head(learner, [rows[order]], len(tasks), batch_size, views or {})
        places = np.split(np.argsort(order), np.cumsum([len(part) for part in parts])[:-1])
        mixed = [[_rows_of(by_class, place) for by_class in shuffled] for place in places]
    result = Evaluation([], [], [])
    for task, by_head, by_head_mixed in zip(tasks, logits, mixed, strict=True):
        targets = learner.targets(task.test)
        own = by_head[task.index]
        mean, width = float(learner.likelihood.mean_loss(own, targets)), int(own.shape[1])
        result.loss.append(learner.target_scale * learner.likelihood.natural(mean, width))
        if not learner.likelihood.has_labels:
            result.accuracy.append(math.nan)
            result.class_incremental_accuracy.append(math.nan)
            continue
        xp = namespace(logits=own, targets=targets)
        among_own = xp.argmax(own, axis=-1)
        result.accuracy.append(_percent(among_own == targets))
        among_all = xp.argmax(xp.concat(by_head_mixed, axis=1), axis=-1)
        result.class_incremental_accuracy.append(_percent(among_all == targets + task.index * width))
    return result


def _by_one_head(learner: Learner, tasks: Sequence[Task], batch_size: int) -> Evaluation:
    """Return what a learner reaches whose tasks share a head."""
    result, likelihood = Evaluation([], [], []), learner.likelihood
    for task in tasks:
        total = units = correct = counted = 0.0
        for outputs, targets in _own_batches_of_one_head(learner, task.test, batch_size):
            total, units = total + float(likelihood.loss(outputs, targets)), units + likelihood.count(targets)
            if likelihood.has_labels:
                xp = namespace(outputs=outputs, targets=targets)
                correct += int(xp.count_nonzero(xp.argmax(outputs, axis=-1) == targets))
                counted += int(xp.count_nonzero(targets >= 0))
        sums = _of_all_processes(learner, len(chunks(task.test, batch_size)), outputs, [total, units, correct, counted])
        total, units, correct, counted = sums
        width = int(outputs.shape[-1])
        result.loss.append(learner.target_scale * likelihood.natural(total / units, width))
        accuracy = 100 * correct / counted if counted else math.nan
        result.accuracy.append(accuracy)
        result.class_incremental_accuracy.append(accuracy)
    return result


def _own_batches_of_one_head(learner: Learner, rows: Indices, batch_size: int) -> Iterator[tuple[Array, Array]]:
    """Yield the outputs of the shared head, and the targets, a batch at a time, because logits of text are many."""
    for part in learner.share.own(chunks(rows, batch_size)):
        yield learner.logits(part, batch_size)[:, 0, ...], learner.targets(part)


def _of_all_processes(learner: Learner, parts: int, like: Array, sums: list[float]) -> list[float]:
    """Return sums over this process's own parts as sums over all."""
    exchange = learner.share.exchange(parts)
    if exchange is None:
        return sums
    xp: Any = namespace(like=like)
    total = exchange.total({"sums": xp.asarray(sums, dtype=xp.float64, device=device(like))})["sums"]
    return [float(value) for value in total]


def _logits_by_head(
    learner: Learner, parts: Sequence[Indices], heads: int, batch_size: int, views: Mapping[int, View]
) -> list[list[Array]]:
    """Return, for each part of the rows and each of the first heads, the logits [samples, classes].

    They are by the weights of the head's task. Batches do not cross from one part to the next.
    """
    logits: list[list[Array]] = []
    for rows in parts:
        of_all_heads = learner.logits(rows, batch_size)
        logits.append([of_all_heads[:, head, :] for head in range(heads)])
    for head, view in views.items():
        with seen_through(learner, view):
            for by_head, rows in zip(logits, parts, strict=True):
                by_head[head] = learner.logits(rows, batch_size)[:, head, :]
    return logits


def _rows_of(logits: Array, places: Indices) -> Array:
    xp: Any = namespace(logits=logits)
    return xp.take(logits, xp.asarray(places, device=device(logits)), axis=0)


def _percent(correct: Array) -> float:
    xp = namespace(correct=correct)
    return 100.0 * int(xp.count_nonzero(correct)) / int(correct.shape[0])


def mean_loss(learner: Learner, task: int, indices: Indices, batch_size: int) -> float:
    """Return the mean loss of a task's head on these samples, in evaluation, in nats."""
    if not learner.shares_head:
        logits = learner.logits(indices, batch_size)[:, task, :]
        return float(learner.likelihood.mean_loss(logits, learner.targets(indices)))
    total = units = 0.0
    for outputs, targets in _own_batches_of_one_head(learner, indices, batch_size):
        total += float(learner.likelihood.loss(outputs, targets))
        units += learner.likelihood.count(targets)
    total, units = _of_all_processes(learner, len(chunks(indices, batch_size)), outputs, [total, units])
    return total / units


@dataclass(frozen=True)
class Measurement:
    """What can be measured of one task at the learner's present weights.

    It is the ``LocalLoss`` that a merging rule asks about the new task's loss, and the ``TaskStart`` and the
    ``FinishedTask`` that a projector asks.

    Attributes:
        learner: the learner, with its weights and data.
        task: the task that is measured.
        training: the settings of the run, which have the batch size and the numbers of samples.
        kind: the kind of diagonal Fisher information.
        seed: the seed of the run.
        purpose: what the measurement is for, such as "merge" or "posterior"; random draws depend on the seed, the task
            and the purpose.
        region: the region that the task is learned in, if any; the loss is then measured as a function of the shared
            weights.
        still: the names of shared parameters that no stage changes; projectors remember nothing of them.
        last: the task that was learned last, to whose images running statistics belong; None for the measured task.
    """

    learner: Learner
    task: Task
    training: Training
    kind: FisherKind
    seed: int
    purpose: str
    region: Region | None = None
    still: frozenset[str] = frozenset()
    last: Task | None = None

    def diagonal(self) -> Diagonal:
        """Return the diagonal Fisher information of all parameters; ``kind`` says which one."""
        rows, parameters = self.curvature_rows(), weights_of(self.learner)
        parts = chunks(rows, self.training.batch_size)
        sizes = [len(part) for part in self.learner.share.own(parts)]
        with seen_through(self.learner, self.region):
            taps = self._fisher_taps(rows)
            samples = self._units(rows)
            fisher = diagonal_fisher(
                taps,
                parameters,
                self.kind,
                samples=samples,
                sizes=sizes,
                first=len(parts[0]) if parts else None,
                exchange=self._exchange(rows),
            )
            return Diagonal(fisher)

    def kronecker(self, sharing: Sharing = "expand") -> Precision:
        """Return Kronecker factors of the curvature for weights and biases, and the diagonal for other parameters.

        Args:
            sharing: how the positions of a layer are averaged, as ``became_core.curvature.kfac`` defines it.

        Raises:
            BecameError: if ``kind`` is "batch", which has no Kronecker factors.
        """
        if self.kind == "batch":
            raise BecameError("the kind 'batch' has no Kronecker factors; choose empirical, true or sampled.")
        rows, shapes = self.curvature_rows(), {n: tuple(v.shape) for n, v in self.learner.parameters().items()}
        with seen_through(self.learner, self.region):
            taps, units = self._fisher_taps(rows), self._units(rows)
            factors, rest = kronecker_factors(
                taps, samples=len(rows), sharing=sharing, units=units, exchange=self._exchange(rows)
            )
        parts: list[Precision] = []
        if factors:
            parts.append(Kronecker(factors, shapes={name: shapes[name] for name in factors}))
        if rest:
            parts.append(Diagonal({n: namespace(value=v).reshape(v, shapes[n]) for n, v in rest.items()}))
        return sum(parts[1:], start=parts[0])

    def precision(self, structure: Structure) -> Precision:
        """Return the curvature in a structure, by ``diagonal`` or by ``kronecker``."""
        return self.diagonal() if structure == "diagonal" else self.kronecker()

    def logit_gradients(self, count: int) -> Iterator[Params]:
        """Yield the gradients of the true class's logit at single training samples, batch by batch.

        Args:
            count: how many samples there are in all; all training samples if there are fewer.

        Yields:
            For each shared parameter, an array [samples, *parameter shape].
        """
        rows, heads = self._sample("logit-gradients", count), heads_of(self.learner)
        shared = {name: it for name, it in weights_of(self.learner).items() if name not in heads | self.still}
        rng = random_generator(self.seed, "logit-gradient-taps", self.task.index)
        parts = chunks(rows, self.training.batch_size)
        for part, taps in zip(parts, self._taps(rows, "logit", rng, own=False), strict=True):
            by_layer, samples = per_sample_gradients(taps), len(part)
            gradients: Params = {}
            for name, like in shared.items():
                xp = namespace(parameter=like)
                # The logit does not depend on a parameter that has no tap.
                value = by_layer[name] if name in by_layer else xp.stack([xp.zeros_like(like)] * samples)
                gradients[name] = xp.reshape(value, (samples, *like.shape))
            yield gradients

    def _fisher_taps(self, rows: Indices) -> Iterator[Taps]:
        rng = random_generator(self.seed, f"fisher-{self.purpose}", self.task.index)
        return self._taps(rows, TAP_MODES[self.kind], rng)

    def along(self, directions: Sequence[Params], origin: Params | None = None) -> Quadratic:
        """Return the mean loss along directions, as a quadratic with the exact slopes and curvatures at its origin.

        The samples are those of ``curvature_rows``. Running statistics are constants in these derivatives; they are
        those that belong to the weights of the origin.

        Args:
            directions: K directions, each by parameter.
            origin: the weights at which derivatives are taken; those of the learner if None.
        """
        if origin is not None:
            with self.learner.at(origin):
                self._refresh_statistics()
                return self.along(directions)
        rows, size = self.curvature_rows(), self.training.batch_size
        if self.region is not None:  # Effective weights are linear in the shared weights, and so are directions.
            directions = [self.region.effective(direction) for direction in directions]
        if self.learner.running_statistics:
            theta = self.learner.parameters()
            constant = {name: theta[name] * 0 for name in self.learner.running_statistics}
            directions = [direction | constant for direction in directions]
        with seen_through(self.learner, self.region):
            batches = self.learner.pushforward(self.task.index, rows, size, directions)
            return Quadratic(*derivatives_along(batches, self.learner.likelihood, self._exchange(rows)))

    def slope(self, origin: Params, directions: Sequence[Params]) -> Array:
        """Return the slopes of the mean loss along K directions at other weights, [K]."""
        return self.along(directions, origin).slope

    def gradients(self) -> Params:
        """Return the gradient of the mean loss by every projectable weight, on the samples of ``curvature_rows``.

        Batch statistics are constants. With batch norm by batch, the result is therefore not the gradient that training
        sees: on the same samples, the two differ by 0.66 to 1.25 of its norm. Running statistics, if there are any, are
        estimated first.
        """
        self._refresh_statistics()
        rows, parameters = self.curvature_rows(), self.learner.parameters()
        rng, total = random_generator(self.seed, "gradient-taps", self.task.index), dict[str, Array]()
        with seen_through(self.learner, self.region):
            for taps in self._taps(rows, "empirical", rng):
                for name, value in batch_gradient(taps).items():
                    total[name] = total[name] + value if name in total else value
        exchange = self._exchange(rows)
        total = total if exchange is None else exchange.total(total)
        projectable, units = sorted(self.learner.projectable & set(total)), self._units(rows)
        return {
            name: namespace(total=total[name]).reshape(total[name], parameters[name].shape) / units
            for name in projectable
        }

    def loss(self) -> float:
        """Return the mean loss in evaluation, on the samples of ``curvature_rows``."""
        with seen_through(self.learner, self.region):
            return mean_loss(self.learner, self.task.index, self.curvature_rows(), self.training.batch_size)

    @property
    def mean(self) -> Params:
        """The learner's weights, without running statistics."""
        return weights_of(self.learner)

    @property
    def index(self) -> int:
        """The task's number."""
        return self.task.index

    @property
    def weights(self) -> Params:
        """The learner's weights, without running statistics."""
        return weights_of(self.learner)

    @property
    def projectable(self) -> frozenset[str]:
        """Names of the shared weights that taps describe as matrices and that some stage changes."""
        return self.learner.projectable - self.still

    @property
    def heads(self) -> Sequence[frozenset[str]]:
        """For each task, the names of the parameters that are its own."""
        return self.learner.heads

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the generator of random numbers that belongs to the run's seed, the purpose and the task."""
        return random_generator(self.seed, purpose, self.task.index)

    def inputs(self, theta: Params) -> Params:
        """Return each layer's inputs for a few samples at other weights, [samples, positions, d_in], by weight."""
        rows = self.task.measured[:TRIED_SAMPLES]
        with self.learner.at(theta):
            batches = self.learner.taps(self.task.index, rows, len(rows), "empirical", random_generator(0, "wiring"))
            (taps,) = batches
            return {tap.weight_name(layer): tap.inputs for layer, tap in taps.items()}

    def input_grams(self) -> Params:
        """Return, for each weight that can be protected, the mean of a a^T over the samples of ``projector_rows``."""
        with seen_through(self.learner, self.region):
            exchange = self._exchange(self.projector_rows())
            return input_grams(self._projector_taps("inputs"), self.projectable, exchange)

    def gradient_grams(self) -> Params:
        """Return, for each weight that can be protected, the mean of G^T G over the batches of ``projector_rows``."""
        with seen_through(self.learner, self.region):
            exchange = self._exchange(self.projector_rows())
            return gradient_grams(self._projector_taps("empirical"), self.projectable, exchange)

    def _projector_taps(self, mode: TapMode) -> Iterator[Taps]:
        return self._taps(self.projector_rows(), mode, random_generator(self.seed, "projector-taps", self.task.index))

    def projector_rows(self) -> Indices:
        """Return the training rows of the Gram matrices that a projector remembers the task by."""
        return self._sample("projector", self.training.projector_samples)

    def curvature_rows(self) -> Indices:
        """Return the training rows that curvature is measured on.

        They are the same for every purpose, so that the ratio of two curvatures is one of the same samples.
        """
        return self._sample("curvature", self.training.curvature_samples)

    def _units(self, rows: Indices) -> float:
        return self.learner.likelihood.count(self.learner.targets(rows))

    def _exchange(self, rows: Indices) -> Exchange | None:
        return self.learner.share.exchange(len(chunks(rows, self.training.batch_size)))

    def _taps(self, rows: Indices, mode: TapMode, rng: np.random.Generator, own: bool = True) -> Iterator[Taps]:
        """Yield the taps of this process's own batches, or of all."""
        batches = self.learner.taps(self.task.index, rows, self.training.batch_size, mode, rng, own=own)
        # The Gram matrices of inputs are those of what a layer really reads, so these taps are not changed.
        return batches if mode == "inputs" else (taps_of_shared_weights(self.region, taps) for taps in batches)

    def _refresh_statistics(self) -> None:
        tasks, size = [self.last or self.task], self.training.batch_size
        refresh_statistics(self.learner, tasks, size, self.seed, self.region)

    def _sample(self, purpose: str, count: int | None) -> Indices:
        if count is None:
            return self.task.measured
        return random_generator(self.seed, purpose, self.task.index).permutation(self.task.measured)[:count]
