"""Learning-rate schedules, as frozen values that advance epoch by epoch.

Convention: a schedule is its own state. ``rates`` gives the learning rate of each step of the coming epoch, ``advance``
the schedule after it, until it is ``finished``; so a run resumes from the value alone. Where ``needs_validation``, the
advance looks at the validation loss; where ``restores_best``, a stage ends on the weights with the best one.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from became_core.continual.data import Augmentation
from became_core.continual.step import SGD, Optimiser
from became_core.errors import BecameError

__all__ = ["Annealed", "Patience", "RelativeRates", "Schedule", "Stepped", "Training"]


@dataclass(frozen=True)
class Annealed:
    """A cosine from ``lr`` down to ``final_lr``, reached at the last step of the last epoch."""

    lr: float
    epochs: int
    final_lr: float = 0.0
    epoch: int = 0
    needs_validation: bool = False
    restores_best: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.epochs < 1 or self.lr <= 0:
            raise BecameError(f"a stage has {self.epochs} epochs at lr {self.lr}; give at least 1 and an lr above 0.")

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.epochs

    def rates(self, steps: int) -> NDArray[np.float64]:
        """Return ``final_lr + (lr - final_lr) * (1 + cos(pi * progress)) / 2`` for each step, [steps]."""
        done = self.epoch * steps + np.arange(steps)
        progress = done / max(self.epochs * steps - 1, 1)
        return self.final_lr + (self.lr - self.final_lr) * (1 + np.cos(np.pi * progress)) / 2

    def advance(self, validation_loss: float) -> Self:
        """Return the schedule one epoch on."""
        return replace(self, epoch=self.epoch + 1)

    def extended(self, epochs: int) -> Self:
        """Return one annealing over so many epochs more."""
        return replace(self, epochs=self.epochs + epochs)


@dataclass(frozen=True)
class Patience:
    """The published schedule: divide the rate when the validation loss has not improved for a while, stop when small.

    Attributes:
        lr: the current learning rate.
        factor: what it is divided by.
        patience: after how many epochs without a better validation loss.
        minimum: training stops when the rate would fall below it.
        epochs: and at the latest after so many epochs.
        restores_best: whether the stage ends on the best validation model (stage 1) or the last (stage 2).
    """

    lr: float
    factor: float = 2.0
    patience: int = 6
    minimum: float = 5e-5
    epochs: int = 200
    restores_best: bool = True
    epoch: int = 0
    best: float = math.inf
    waited: int = 0
    needs_validation: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.epochs < 1 or self.lr <= 0 or self.factor <= 1:
            raise BecameError("a patience schedule needs at least 1 epoch, an lr above 0 and a factor above 1.")

    @property
    def finished(self) -> bool:
        """Whether the rate has fallen below the minimum, or all epochs are done."""
        return self.lr < self.minimum or self.epoch >= self.epochs

    def rates(self, steps: int) -> NDArray[np.float64]:
        """Return the current rate for each step, [steps]."""
        return np.full(steps, self.lr)

    def advance(self, validation_loss: float) -> Self:
        """Return the schedule after an epoch that ended with this validation loss."""
        after = replace(self, epoch=self.epoch + 1)
        if validation_loss < self.best:
            return replace(after, best=validation_loss, waited=0)
        if self.waited + 1 < self.patience:
            return replace(after, waited=self.waited + 1)
        return replace(after, waited=0, lr=self.lr / self.factor)

    def extended(self, epochs: int) -> Self:
        """Return this schedule: it ends by itself, whatever its budget."""
        return self


@dataclass(frozen=True)
class Stepped:
    """A rate that is divided when given shares of all epochs are done, such as 30 and 60 of 80 (Wang 2021).

    Attributes:
        lr: the learning rate to begin with.
        epochs: how many there are.
        milestones: the shares of the epochs after which the rate is divided, each in (0, 1).
        factor: what it is divided by.
    """

    lr: float
    epochs: int
    milestones: tuple[float, ...] = (0.375, 0.75)
    factor: float = 2.0
    epoch: int = 0
    needs_validation: bool = False
    restores_best: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.epochs < 1 or self.lr <= 0 or self.factor <= 1:
            raise BecameError("a stepped schedule needs at least 1 epoch, an lr above 0 and a factor above 1.")
        if not all(0 < share < 1 for share in self.milestones):
            raise BecameError(f"the milestones are {self.milestones}; each is a share of the epochs, between 0 and 1.")

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.epochs

    def rates(self, steps: int) -> NDArray[np.float64]:
        """Return the current rate for each step, [steps]."""
        passed = sum(self.epoch >= share * self.epochs for share in self.milestones)
        return np.full(steps, self.lr / self.factor**passed)

    def advance(self, validation_loss: float) -> Self:
        """Return the schedule one epoch on."""
        return replace(self, epoch=self.epoch + 1)

    def extended(self, epochs: int) -> Self:
        """Return the schedule over so many epochs more, divided at the same shares of them all."""
        return replace(self, epochs=self.epochs + epochs)


Schedule = Annealed | Patience | Stepped


@dataclass(frozen=True)
class RelativeRates:
    """What the schedule's learning rate is multiplied by, for groups of parameters, in both stages (Wang 2021).

    Attributes:
        heads: for heads.
        norms: for shared parameters that are no matrix of which taps speak: those of normalisation layers, and biases.
        first: for all others in the first task; in later tasks they have the schedule's own rate.

    Raises:
        BecameError: if one is not above 0.
    """

    heads: float = 1.0
    norms: float = 1.0
    first: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("heads", "norms", "first"):
            if not 0 < getattr(self, name) < math.inf:
                raise BecameError(f"the relative learning rate '{name}' is {getattr(self, name)}; it must be above 0.")


@dataclass(frozen=True)
class Training:
    """How every method trains.

    Attributes:
        stage1: the schedule under constraint.
        stage2: the schedule of methods that go on without one.
        optimiser: what turns gradients into steps; it begins anew with every stage.
        relative: learning rates of groups of parameters, beside the schedule's.
        batch_size: of training, and of evaluation, since batch statistics make accuracy depend on it.
        projector_samples: training samples of a task that the projector's memory is made from; all if None.
        curvature_samples: training samples for Fisher information and directional curvature; all if None.
        path_alphas: where the true loss is traced on every merging path; nowhere if empty.
        augmentation: how training images are cropped and flipped; not at all if None.
    """

    stage1: Schedule
    stage2: Schedule
    optimiser: Optimiser = field(default_factory=SGD)
    batch_size: int = 64
    projector_samples: int | None = 125
    curvature_samples: int | None = None
    path_alphas: tuple[float, ...] = ()
    augmentation: Augmentation | None = None
    relative: RelativeRates = field(default_factory=RelativeRates)
