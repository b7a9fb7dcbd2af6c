"""Learning-rate schedules, which are frozen values that advance epoch by epoch, and the settings of training.

Convention: a schedule is its own state, so a run can go on from the value alone. ``rates`` returns the learning rate of
each step of the next epoch, and ``advance`` returns the schedule after that epoch, until it is ``finished``. If
``needs_validation`` is true, ``advance`` uses the validation loss. If ``restores_best`` is true, a stage ends with the
weights of the smallest validation loss.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from became_core.continual.adaptation import Adaptation
from became_core.continual.data import Augmentation
from became_core.continual.step import SGD, Optimiser
from became_core.errors import BecameError

__all__ = ["Annealed", "Patience", "RelativeRates", "Schedule", "Stepped", "Training"]


@dataclass(frozen=True)
class Annealed:
    """A learning rate that falls as half a cosine.

    Attributes:
        lr: the learning rate of the first step.
        epochs: how many epochs there are.
        final_lr: the learning rate of the last step of the last epoch.
        epoch: how many epochs are done.

    Raises:
        BecameError: if there is no epoch, or a learning rate is negative or not finite, or the first one is 0.

    Examples:
        >>> [round(float(rate), 3) for rate in Annealed(lr=0.1, epochs=1).rates(3)]
        [0.1, 0.05, 0.0]
    """

    lr: float
    epochs: int
    final_lr: float = 0.0
    epoch: int = 0
    needs_validation: bool = False
    restores_best: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.epochs < 1 or not 0 < self.lr < math.inf:
            raise BecameError(f"a stage has {self.epochs} epochs at lr {self.lr}; give at least 1 and an lr above 0.")
        if not 0 <= self.final_lr < math.inf:
            raise BecameError(f"the final learning rate is {self.final_lr}; it must be at least 0 and finite.")

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
        """Return the schedule after one more epoch."""
        return replace(self, epoch=self.epoch + 1)

    def scaled(self, factor: float) -> Self:
        """Return the schedule with all learning rates multiplied by a factor; the same schedule for a factor of 1."""
        return replace(self, lr=self.lr * factor, final_lr=self.final_lr * factor)

    def extended(self, epochs: int) -> Self:
        """Return the schedule that falls over ``epochs`` more epochs."""
        return replace(self, epochs=self.epochs + epochs)


@dataclass(frozen=True)
class Patience:
    """The published schedule: the rate is divided when the validation loss stops improving, until it is small.

    Attributes:
        lr: the present learning rate.
        factor: the number that the rate is divided by.
        patience: after how many epochs without a better validation loss the rate is divided.
        minimum: training stops when the rate falls below this.
        epochs: training stops after this many epochs at the latest.
        restores_best: whether the stage ends with the model of the best validation loss (stage 1) or the last model
            (stage 2).
        epoch: how many epochs are done.
        best: the best validation loss so far.
        waited: how many epochs have passed since the best loss, or since the rate was divided.

    Raises:
        BecameError: if there is no epoch, the learning rate is not above 0, the factor is not above 1, the patience is
            below 1, a number is not finite, or the learning rate begins below the minimum.
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
        if self.epochs < 1 or not 0 < self.lr < math.inf or not 1 < self.factor < math.inf:
            raise BecameError("a patience schedule needs at least 1 epoch, an lr above 0 and a factor above 1.")
        if self.patience < 1 or not 0 <= self.minimum < math.inf:
            raise BecameError(
                f"the patience is {self.patience} epochs and the least lr {self.minimum}; give at least 1 and 0."
            )
        if self.epoch == 0 and self.lr < self.minimum:
            raise BecameError(
                f"the learning rate {self.lr:g} is below the least one, {self.minimum:g}, so that no epoch would be "
                "trained; give a larger lr, or a smaller minimum."
            )

    @property
    def finished(self) -> bool:
        """Whether the rate has fallen below the minimum, or all epochs are done."""
        return self.lr < self.minimum or self.epoch >= self.epochs

    def rates(self, steps: int) -> NDArray[np.float64]:
        """Return the current rate for each step, [steps]."""
        return np.full(steps, self.lr)

    def advance(self, validation_loss: float) -> Self:
        """Return the schedule after one more epoch, which ended with this validation loss."""
        after = replace(self, epoch=self.epoch + 1)
        if validation_loss < self.best:
            return replace(after, best=validation_loss, waited=0)
        if self.waited + 1 < self.patience:
            return replace(after, waited=self.waited + 1)
        return replace(after, waited=0, lr=self.lr / self.factor)

    def scaled(self, factor: float) -> Self:
        """Return the schedule with all learning rates multiplied by a factor; the same schedule for a factor of 1."""
        return replace(self, lr=self.lr * factor, minimum=self.minimum * factor)

    def extended(self, epochs: int) -> Self:
        """Return this schedule as it is, because the validation loss decides when it ends."""
        return self


@dataclass(frozen=True)
class Stepped:
    """A rate that is divided after fixed shares of all epochs, such as 30 and 60 of 80 (Wang 2021).

    Attributes:
        lr: the learning rate of the first epoch.
        epochs: how many epochs there are.
        milestones: the shares of the epochs after which the rate is divided, each in (0, 1).
        factor: the number that the rate is divided by.
        epoch: how many epochs are done.

    Raises:
        BecameError: if there is no epoch, the learning rate is not above 0, the factor is not above 1, or a milestone
            is not in (0, 1).
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
        if self.epochs < 1 or not 0 < self.lr < math.inf or not 1 < self.factor < math.inf:
            raise BecameError("a stepped schedule needs at least 1 epoch, an lr above 0 and a factor above 1.")
        if not all(0 < share < 1 for share in self.milestones):
            raise BecameError(f"the milestones are {self.milestones}; each is a share of the epochs, between 0 and 1.")

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.epochs

    def rates(self, steps: int) -> NDArray[np.float64]:
        """Return the current rate for each step, [steps]."""
        # 7 / 25 of 25 epochs are 7.000000000000001.
        passed = sum(self.epoch >= (share - 1e-9) * self.epochs for share in self.milestones)
        return np.full(steps, self.lr / self.factor**passed)

    def advance(self, validation_loss: float) -> Self:
        """Return the schedule after one more epoch."""
        return replace(self, epoch=self.epoch + 1)

    def scaled(self, factor: float) -> Self:
        """Return the schedule with all learning rates multiplied by a factor; the same schedule for a factor of 1."""
        return replace(self, lr=self.lr * factor)

    def extended(self, epochs: int) -> Self:
        """Return the schedule with ``epochs`` more epochs, whose rate is divided at the same shares of all of them."""
        return replace(self, epochs=self.epochs + epochs)


Schedule = Annealed | Patience | Stepped


@dataclass(frozen=True)
class RelativeRates:
    """Factors of the schedule's learning rate for groups of parameters, in both stages (Wang 2021).

    Attributes:
        heads: the factor of heads, also of one that all tasks share.
        norms: the factor of the shared parameters that taps do not describe as matrices, which are those of
            normalisation layers, and biases.
        first: the factor of all other parameters in the first task; in later tasks it is 1.

    Raises:
        BecameError: if a factor is not above 0.
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
    """The settings of training, which all methods share.

    Attributes:
        stage1: the schedule of stage 1.
        stage2: the schedule of stage 2.
        optimiser: the optimiser, which begins anew in every stage.
        batch_size: the batch size of training, and of evaluation too, because with batch statistics the accuracy
            depends on it.
        projector_samples: how many training samples of a task the projector's memory is computed from; all if None.
        curvature_samples: how many training samples of a task curvature is measured on; all if None.
        path_alphas: the values of alpha at which the true loss is traced on every merging path; none if empty.
        augmentation: how training images are cropped and flipped; None for no augmentation.
        relative: the factors of the learning rate for groups of parameters.
        adaptation: which parameters learn; all of them by default.
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
    adaptation: Adaptation = field(default_factory=Adaptation)
