"""Measurements of a task at a learner's present weights: its loss, curvature, gradients and Gram matrices.

Convention: losses and curvature are means over samples, Gram matrices of inputs are means over samples and positions,
and Gram matrices of gradients are means over batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from became_core.arrays import Array, Params, namespace
from became_core.continual.data import Indices, Task, chunks
from became_core.continual.evaluation import mean_loss
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
    per_sample_factors,
    per_sample_gradients,
)
from became_core.errors import BecameError
from became_core.laplace import Diagonal, Kronecker, Precision, Quadratic
from became_core.projection import Products, Region

__all__ = ["Measurement", "Structure"]

Structure = Literal["diagonal", "kronecker"]
"""The structure in which a task's curvature is measured."""

# How many samples the network runs on when a projector asks for its layers' inputs.
TRIED_SAMPLES = 8


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
        sharpness: what the logits are multiplied by where the loss and its curvature are measured, the inverse of a
            softmax temperature; 1 measures the loss as it is trained on.
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
    sharpness: float = 1.0

    def diagonal(self) -> Diagonal:
        """Return the diagonal Fisher information of all parameters; ``kind`` says which one."""
        rows, parameters = self.curvature_rows(), weights_of(self.learner)
        parts = chunks(rows, self.training.batch_size)
        sizes = [len(part) for part in self.learner.share.own(parts)]
        with self._seen():
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
        with self._seen():
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

    def logit_gradients(self, count: int) -> Iterator[dict[str, Array | Products]]:
        """Yield the gradients of the true class's logit at single training samples, batch by batch.

        Args:
            count: how many samples there are in all; all training samples if there are fewer.

        Yields:
            For each shared parameter, an array [samples, *parameter shape], or its factors.
        """
        rows, heads = self._sample("logit-gradients", count), heads_of(self.learner)
        shared = {name: it for name, it in weights_of(self.learner).items() if name not in heads | self.still}
        rng = random_generator(self.seed, "logit-gradient-taps", self.task.index)
        parts = chunks(rows, self.training.batch_size)
        for part, taps in zip(parts, self._taps(rows, "logit", rng, own=False), strict=True):
            factors, samples = per_sample_factors(taps), len(part)
            by_layer = per_sample_gradients(taps, without=factors)
            gradients: dict[str, Array | Products] = {}
            for name, like in shared.items():
                if name in factors:
                    gradients[name] = Products(*factors[name])
                    continue
                xp = namespace(parameter=like)
                # The logit does not depend on a parameter that has no tap.
                value = by_layer[name] if name in by_layer else xp.stack([xp.zeros_like(like)] * samples)
                gradients[name] = xp.reshape(value, (samples, *like.shape))
            yield gradients

    def _fisher_taps(self, rows: Indices) -> Iterator[Taps]:
        rng = random_generator(self.seed, f"fisher-{self.purpose}", self.task.index)
        batches = self._taps(rows, TAP_MODES[self.kind], rng)
        return batches if self.sharpness == 1 else map(self._of_own_head, batches)

    def along(self, directions: Sequence[Params], origin: Params | None = None) -> Quadratic:
        """Return the mean loss along directions, as a quadratic with the exact slopes and curvatures at its origin.

        The samples are those of ``curvature_rows``. Running statistics are constants in these derivatives; they are
        those that belong to the weights of the origin.

        Args:
            directions: K directions, each by parameter.
            origin: the weights at which derivatives are taken; those of the learner if None.
        """
        if origin is not None:
            with self._moved_to(origin):
                return self.along(directions)
        rows, size = self.curvature_rows(), self.training.batch_size
        if self.region is not None:  # Effective weights are linear in the shared weights, and so are directions.
            directions = [self.region.effective(direction) for direction in directions]
        if self.learner.running_statistics:
            theta = self.learner.parameters()
            constant = {name: theta[name] * 0 for name in self.learner.running_statistics}
            directions = [direction | constant for direction in directions]
        directions = [self._sharpened(direction) for direction in directions]
        with self._seen():
            batches = self.learner.pushforward(self.task.index, rows, size, directions)
            return Quadratic(*derivatives_along(batches, self.learner.likelihood, self._exchange(rows)))

    def slope(self, origin: Params, directions: Sequence[Params]) -> Array:
        """Return the slopes of the mean loss along K directions at other weights, [K]."""
        return self.along(directions, origin).slope

    def gradients(self) -> Params:
        """Return the gradient of the mean loss by every projectable weight, on as many training samples as curvature.

        Batch statistics are constants. With batch norm by batch, the result is therefore not the gradient that training
        sees: on the same samples, the two differ by 0.66 to 1.25 of its norm. Running statistics, if there are any, are
        estimated first.
        """
        self._refresh_statistics()
        rows = self._sample("curvature", self.training.curvature_samples)
        parameters = self.learner.parameters()
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

    def loss(self, origin: Params | None = None) -> float:
        """Return the mean loss in evaluation, on the samples of ``curvature_rows``.

        Args:
            origin: the weights at which it is measured; those of the learner if None.
        """
        if origin is not None:
            with self._moved_to(origin):
                return self.loss()
        with self._seen():
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
        """Return the rows that the loss and its curvature are measured on: training rows, or those that the task names.

        They are the same for every purpose, so that the ratio of two curvatures is one of the same samples.
        """
        return self._sample("curvature", self.training.curvature_samples, self.task.curvature)

    def outputs(self, rows: Indices) -> Array:
        """Return the outputs of the task's head in evaluation, [samples, ...], whatever the sharpness is."""
        with seen_through(self.learner, self.region):
            head = 0 if self.learner.shares_head else self.task.index
            return self.learner.logits(rows, self.training.batch_size, slice(head, head + 1))[:, 0, ...]

    def held_out(self) -> "Measurement":
        """Return the same measurement on the task's validation rows."""
        return replace(self, task=replace(self.task, curvature=self.task.validation))

    @contextmanager
    def _moved_to(self, origin: Params) -> Iterator[None]:
        """Set the learner to other weights inside the context, with the running statistics that belong to them."""
        with self.learner.at(origin):
            self._refresh_statistics()
            yield

    @contextmanager
    def _seen(self) -> Iterator[None]:
        """Set the learner to the weights of the measured loss inside the context.

        Logits are linear in the head's parameters, so those of a sharper softmax are the logits of a larger head.
        """
        with seen_through(self.learner, self.region):
            if self.sharpness == 1:
                yield
                return
            with self.learner.at(self._sharpened(self.learner.parameters())):
                yield

    def _sharpened(self, parameters: Params) -> Params:
        """Return parameters, or a direction among them, with the task's head multiplied by the sharpness."""
        if self.sharpness == 1:
            return parameters
        head = self.learner.heads[self.task.index] or self.learner.shared_head
        return {name: value * self.sharpness if name in head else value for name, value in parameters.items()}

    def _of_own_head(self, taps: Taps) -> Taps:
        """Return taps by the head as it is, given those by the larger head that ``_seen`` works with."""
        head = self.learner.heads[self.task.index] or self.learner.shared_head
        return {
            layer: replace(tap, output_gradients=tap.output_gradients * self.sharpness)
            if tap.weight_name(layer) in head
            else tap
            for layer, tap in taps.items()
        }

    def _units(self, rows: Indices) -> float:
        return self.learner.likelihood.count(self.learner.targets(rows))

    def _exchange(self, rows: Indices) -> Exchange | None:
        return self.learner.share.exchange(len(chunks(rows, self.training.batch_size)))

    def _taps(self, rows: Indices, mode: TapMode, rng: np.random.Generator, own: bool = True) -> Iterator[Taps]:
        """Yield the taps of this process's own batches, or of all."""
        batches = self.learner.taps(self.task.index, rows, self.training.batch_size, mode, rng, own=own)
        # The Gram matrices of inputs are those of what a layer really reads, so these taps are not changed.
        return batches if mode == "inputs" else taps_of_shared_weights(self.region, batches)

    def _refresh_statistics(self) -> None:
        tasks, size = [self.last or self.task], self.training.batch_size
        refresh_statistics(self.learner, tasks, size, self.seed, self.region)

    def _sample(self, purpose: str, count: int | None, rows: Indices | None = None) -> Indices:
        rows = self.task.measured if rows is None else rows
        if count is None:
            return rows
        return random_generator(self.seed, purpose, self.task.index).permutation(rows)[:count]
