"""What is measured on a learner at its present weights: curvature for merging, Gram matrices for projectors.

Convention: means, over samples for curvature, over samples and positions for the Gram matrices of inputs, over batches
for those of gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from became_core.arrays import Params
from became_core.continual.learner import Learner, TapMode
from became_core.continual.seeding import random_stream
from became_core.continual.stream import Indices, Task
from became_core.continual.training import Training
from became_core.curvature import FisherKind, Taps, derivatives_along, diagonal_fisher, gradient_grams, input_grams
from became_core.laplace import Diagonal, Quadratic

__all__ = ["Measurement"]


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
    """

    learner: Learner
    task: Task
    training: Training
    kind: FisherKind
    seed: int
    purpose: str

    def diagonal(self) -> Diagonal:
        """Return the diagonal Fisher information, of the method's kind, over all parameters."""
        mode: TapMode = "published" if self.kind == "batch" else "frozen"
        stream = random_stream(self.seed, f"fisher-{self.purpose}", self.task.index)
        taps = self.learner.taps(self.task.index, self.curvature_rows(), self.training.batch_size, mode, stream)
        return Diagonal(diagonal_fisher(taps, self.learner.parameters(), self.kind))

    def along(self, directions: Sequence[Params]) -> Quadratic:
        """Return the loss along directions from the learner's weights, exact on the samples that curvature takes."""
        rows, size = self.curvature_rows(), self.training.batch_size
        return Quadratic(*derivatives_along(self.learner.pushforward(self.task.index, rows, size, directions)))

    @property
    def mean(self) -> Params:
        """The learner's weights."""
        return self.learner.parameters()

    def input_grams(self) -> Params:
        """Return, for each weight that can be protected, the mean of a a^T over a sample of the training images."""
        return input_grams(self._projector_taps(), self.learner.projectable)

    def gradient_grams(self) -> Params:
        """Return, for each such weight, the mean of G^T G over the batches of the same sample."""
        return gradient_grams(self._projector_taps(), self.learner.projectable)

    def _projector_taps(self) -> Iterator[Taps]:
        rows = self._sample("projector", self.training.projector_samples)
        stream = random_stream(self.seed, "projector-taps", self.task.index)
        return self.learner.taps(self.task.index, rows, self.training.batch_size, "frozen", stream)

    def curvature_rows(self) -> Indices:
        """Return the training rows that curvature is measured on, the same for every purpose: ratios share them."""
        return self._sample("curvature", self.training.curvature_samples)

    def _sample(self, purpose: str, count: int | None) -> Indices:
        if count is None:
            return self.task.train
        return random_stream(self.seed, purpose, self.task.index).permutation(self.task.train)[:count]
