"""What is measured on a learner at its present weights: curvature for merging, Gram matrices for projectors.

Convention: means, over samples for curvature, over samples and positions for the Gram matrices of inputs, over batches
for those of gradients.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from became_core.arrays import Array, Params, namespace
from became_core.continual.evaluation import mean_loss
from became_core.continual.learner import Learner, heads_of
from became_core.continual.regions import beneath, reparametrised
from became_core.continual.seeding import random_stream
from became_core.continual.statistics import place, weights_of
from became_core.continual.stream import Indices, Task
from became_core.continual.training import Training
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
    per_sample_gradients,
)
from became_core.errors import BecameError
from became_core.laplace import Diagonal, Kronecker, Precision, Quadratic
from became_core.projection import TrustRegion

__all__ = ["Measurement", "Structure"]

# How a task's curvature is kept.
Structure = Literal["diagonal", "kronecker"]


@dataclass(frozen=True)
class Measurement:
    """A task's loss near the learner's weights; it is what a merging rule asks about the new task.

    Attributes:
        learner: whose weights, and whose data.
        task: whose loss.
        training: how many samples, in batches of what size.
        kind: of diagonal Fisher information.
        seed: the run's.
        purpose: what for, "merge" or "posterior": with the seed and the task it names the random draws.
        region: the task's trust region, if it has one; measured is the loss by the weights beneath.
        last: the task that was learned last, to whose images running statistics belong; the measured one if None.
    """

    learner: Learner
    task: Task
    training: Training
    kind: FisherKind
    seed: int
    purpose: str
    region: TrustRegion | None = None
    last: Task | None = None

    def diagonal(self) -> Diagonal:
        """Return the diagonal Fisher information, of the method's kind, over all parameters."""
        rows, parameters = self.curvature_rows(), weights_of(self.learner)
        with self._as_task():
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
        with self._as_task():
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
        stream = random_stream(self.seed, "logit-gradient-taps", self.task.index)
        size = self.training.batch_size
        batches = self._taps(rows, "logit", stream)
        for start, taps in zip(range(0, len(rows), size), batches, strict=True):
            found, samples = per_sample_gradients(taps), min(size, len(rows) - start)
            gradients: Params = {}
            for name, like in shared.items():
                xp = namespace(parameter=like)
                # A parameter of which no tap speaks takes no part.
                value = found[name] if name in found else xp.stack([xp.zeros_like(like)] * samples)
                gradients[name] = xp.reshape(value, (samples, *like.shape))
            yield gradients

    def _fisher_taps(self, rows: Indices) -> Iterator[Taps]:
        stream = random_stream(self.seed, f"fisher-{self.purpose}", self.task.index)
        return self._taps(rows, TAP_MODES[self.kind], stream)

    def along(self, directions: Sequence[Params], origin: Params | None = None) -> Quadratic:
        """Return the loss along directions from the learner's weights, exact on the samples that curvature takes.

        Given an origin, from there; the learner is left with its own weights. Derivatives take running statistics,
        those that belong to the weights where they are taken, for constants.
        """
        if origin is not None:
            held = self.learner.parameters()
            tasks = [self.last or self.task]
            place(self.learner, origin, tasks, self.training.batch_size, self.seed, self.region)
            found = self.along(directions)
            self.learner.assign(held)
            return found
        rows, size = self.curvature_rows(), self.training.batch_size
        if self.region is not None:  # effective weights are linear in those beneath
            directions = [self.region.effective(direction) for direction in directions]
        if self.learner.statistics:
            held = self.learner.parameters()
            still = {name: held[name] * 0 for name in self.learner.statistics}
            directions = [direction | still for direction in directions]
        with self._as_task():
            return Quadratic(*derivatives_along(self.learner.pushforward(self.task.index, rows, size, directions)))

    def slope(self, origin: Params, directions: Sequence[Params]) -> Array:
        """Return the loss's slopes along K directions at other weights, [K]."""
        return self.along(directions, origin).slope

    def gradients(self) -> Params:
        """Return the mean loss's gradient by every projectable weight, on the samples that curvature takes."""
        rows, parameters = self.curvature_rows(), self.learner.parameters()
        stream, total = random_stream(self.seed, "gradient-taps", self.task.index), dict[str, Array]()
        with self._as_task():
            for taps in self._taps(rows, "empirical", stream):
                for name, value in batch_gradient(taps).items():
                    total[name] = total[name] + value if name in total else value
        projectable = sorted(self.learner.projectable & set(total))
        return {
            name: namespace(total=total[name]).reshape(total[name], parameters[name].shape) / len(rows)
            for name in projectable
        }

    def loss(self) -> float:
        """Return the mean loss on the samples that curvature takes, as in evaluation."""
        with self._as_task():
            return mean_loss(self.learner, self.task.index, self.curvature_rows(), self.training.batch_size)

    @property
    def mean(self) -> Params:
        """The learner's weights."""
        return weights_of(self.learner)

    def input_grams(self) -> Params:
        """Return, for each weight that can be protected, the mean of a a^T over a sample of the training images."""
        with self._as_task():
            return input_grams(self._projector_taps("inputs"), self.learner.projectable)

    def gradient_grams(self) -> Params:
        """Return, for each such weight, the mean of G^T G over the batches of the same sample."""
        with self._as_task():
            return gradient_grams(self._projector_taps("empirical"), self.learner.projectable)

    def _projector_taps(self, mode: TapMode) -> Iterator[Taps]:
        return self._taps(self.projector_rows(), mode, random_stream(self.seed, "projector-taps", self.task.index))

    def projector_rows(self) -> Indices:
        """Return the training rows that projectors remember the task by."""
        return self._sample("projector", self.training.projector_samples)

    def curvature_rows(self) -> Indices:
        """Return the training rows that curvature is measured on, the same for every purpose: ratios share them."""
        return self._sample("curvature", self.training.curvature_samples)

    def _taps(self, rows: Indices, mode: TapMode, stream: np.random.Generator) -> Iterator[Taps]:
        batches = self.learner.taps(self.task.index, rows, self.training.batch_size, mode, stream)
        # What a projector remembers is what a layer sees, whatever weights it works with.
        return batches if mode == "inputs" else (beneath(self.region, taps) for taps in batches)

    def _as_task(self) -> AbstractContextManager[None]:
        return reparametrised(self.learner, self.region)

    def _sample(self, purpose: str, count: int | None) -> Indices:
        if count is None:
            return self.task.train
        return random_stream(self.seed, purpose, self.task.index).permutation(self.task.train)[:count]
