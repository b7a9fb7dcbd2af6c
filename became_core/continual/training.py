"""One stage of training: batches, schedule, validation, and the choice of the best model.

The same for every method and backend. Convention: a stage between two epochs is a value; the weights are the learner's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Params, namespace
from became_core.continual.data import Augmentation, Task
from became_core.continual.learner import Batch, Learner, refresh_statistics, seen_through
from became_core.continual.measurement import mean_loss
from became_core.continual.record import EpochEnd
from became_core.continual.rng import random_generator
from became_core.continual.schedule import Schedule
from became_core.continual.step import Constraint, Optimiser, Trained
from became_core.errors import BecameError
from became_core.projection import Region

__all__ = ["Best", "Stage", "begin_stage", "epoch_batches", "train_stage"]


@dataclass(frozen=True)
class Best:
    """The best validation model of a stage so far: its loss, its parameters, and its region if it has one."""

    loss: float
    theta: Params
    region: Region | None = None


@dataclass(frozen=True)
class Stage:
    """A stage of training between two epochs, all of it but the weights.

    Attributes:
        number: 1 or 2.
        schedule: what is left of it.
        optimiser: after the last step.
        region: the region that the task is trained in, after the last step; None for plain weights.
        best: the model that the stage will end on, where the schedule restores the best one.
        curve: the task's epochs so far, those of earlier stages too.
    """

    number: int
    schedule: Schedule
    optimiser: Optimiser
    region: Region | None = None
    best: Best | None = None
    curve: tuple[EpochEnd, ...] = ()

    @property
    def epochs(self) -> int:
        """The task's epochs so far."""
        return len(self.curve)


def epoch_batches(
    tasks: Sequence[Task], batch_size: int, rng: np.random.Generator, augmentation: Augmentation | None = None
) -> list[Batch]:
    """Return one epoch's batches: each task's rows shuffled and cut, then the batches of all tasks shuffled.

    A last, smaller batch is kept unless it would hold one sample alone, which has no batch statistics. Views are drawn
    last, so that the same rows are in the same batches with them and without.
    """
    batches = [batch for task in tasks for batch in _task_batches(task, batch_size, rng)]
    if len(tasks) > 1:
        batches = [batches[position] for position in rng.permutation(len(batches))]
    if augmentation is None:
        return batches
    return [batch._replace(views=augmentation.draw(len(batch.indices), rng)) for batch in batches]


def _task_batches(task: Task, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
    rows = rng.permutation(task.train)
    for start in range(0, len(rows), batch_size):
        indices = rows[start : start + batch_size]
        if len(indices) > 1 or len(rows) == 1:
            yield Batch(task.index, indices)


def begin_stage(
    learner: Learner,
    task: Task,
    number: int,
    schedule: Schedule,
    optimiser: Optimiser,
    constraint: Constraint,
    *,
    curve: tuple[EpochEnd, ...] = (),
) -> Stage:
    """Return a stage before its first epoch; arguments as the attributes of ``Stage``.

    Raises:
        BecameError: if validation is needed and the task has no validation rows.
    """
    if schedule.needs_validation and not len(task.validation):
        raise BecameError(f"the schedule needs a validation loss, but task {task.index + 1} holds out no samples.")
    theta, region = learner.parameters(), constraint.region
    scales = region.scales if region is not None and constraint.trains_scales else {}
    optimiser = optimiser.initial({name: theta[name] for name in sorted(constraint.trainable)} | scales)
    return Stage(number, schedule, optimiser, region, curve=curve)


def train_stage(
    learner: Learner,
    tasks: Sequence[Task],
    stage: Stage,
    constraint: Constraint,
    *,
    batch_size: int,
    seed: int,
    augmentation: Augmentation | None = None,
    after_epoch: Callable[[Stage, EpochEnd], None] = lambda stage, event: None,
) -> Stage:
    """Train a learner on the last of these tasks (on all of them, if several are given) until the stage is over.

    Args:
        learner: has the weights that belong to the stage.
        tasks: what is trained on.
        stage: from where.
        constraint: what every step must respect; the region is the stage's.
        batch_size: of training and validation.
        seed: names every random draw, with task, stage and epoch.
        augmentation: how training images are cropped and flipped; not at all if None.
        after_epoch: called after every epoch, with the stage as it then is and the epoch's event.

    Returns:
        The stage at its end, when the learner has the best model's weights where the schedule restores it.

    Raises:
        BecameError: if the loss or a weight is no longer finite.
    """
    while not stage.schedule.finished:
        stage, event = _train_epoch(learner, tasks, stage, constraint, batch_size, seed, augmentation)
        after_epoch(stage, event)
    if stage.best is not None:
        learner.assign(stage.best.theta)
        return replace(stage, region=stage.best.region)
    refresh_statistics(learner, tasks, batch_size, seed, stage.region)
    return stage


def _train_epoch(
    learner: Learner,
    tasks: Sequence[Task],
    stage: Stage,
    constraint: Constraint,
    batch_size: int,
    seed: int,
    augmentation: Augmentation | None,
) -> tuple[Stage, EpochEnd]:
    task, schedule, best = tasks[-1], stage.schedule, stage.best
    key = (task.index, stage.number, schedule.epoch)
    batches = epoch_batches(tasks, batch_size, random_generator(seed, "batches", *key), augmentation)
    rates, rng = schedule.rates(len(batches)), random_generator(seed, "dropout", *key)
    constraint = replace(constraint, region=stage.region)
    loss, optimiser, region = _pass_over(learner, batches, rates, constraint, stage.optimiser, rng)
    where = f"task {task.index + 1}, stage {stage.number}, epoch {schedule.epoch + 1}"
    if not math.isfinite(loss):
        raise BecameError(f"the training loss became {loss} in {where}; try a smaller learning rate or penalty.")
    _check_finite(learner, where)
    validation_loss = math.nan
    if schedule.needs_validation:
        refresh_statistics(learner, tasks, batch_size, seed, region)
        with seen_through(learner, region):
            validation_loss = mean_loss(learner, task.index, task.validation, batch_size)
        if schedule.restores_best and validation_loss < (math.inf if best is None else best.loss):
            best = Best(validation_loss, learner.parameters(), region)
    schedule = schedule.advance(validation_loss)
    event = EpochEnd(task.index, stage.number, schedule.epoch, schedule.epochs, loss, float(rates[-1]), validation_loss)
    curve = (*stage.curve, event)
    return replace(stage, schedule=schedule, optimiser=optimiser, region=region, best=best, curve=curve), event


def _pass_over(
    learner: Learner,
    batches: Sequence[Batch],
    rates: NDArray[np.float64],
    constraint: Constraint,
    optimiser: Optimiser,
    rng: np.random.Generator,
) -> Trained:
    """Train on these batches: all at once, or, in a region that changes from step to step, one after the other."""
    region = constraint.region
    if region is None or not region.anneals:
        return learner.train(batches, rates, constraint, optimiser, rng)
    total, last = 0.0, max(len(batches) - 1, 1)
    for step, batch in enumerate(batches):
        assert region is not None
        constraint = replace(constraint, region=region.annealed(step / last))
        loss, optimiser, region = learner.train([batch], rates[step : step + 1], constraint, optimiser, rng)
        total += loss * len(batch.indices)
    return Trained(total / sum(len(batch.indices) for batch in batches), optimiser, region)


def _check_finite(learner: Learner, where: str) -> None:
    """Raise if a parameter is not finite; the last step comes after the last loss, which therefore does not show it."""
    for name, value in learner.parameters().items():
        xp = namespace(value=value)
        if not bool(xp.all(xp.isfinite(value))):
            raise BecameError(f"the parameter '{name}' is not finite after {where}; try a smaller learning rate.")
