"""One stage of training, for every method and backend: batches, schedule, validation, and the choice of the best model.

Convention: a stage between two epochs is a frozen value, which does not have the weights; those are in the learner.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Params, namespace
from became_core.continual.data import Augmentation, Task
from became_core.continual.evaluation import mean_loss
from became_core.continual.learner import Batch, Learner, heads_of, refresh_statistics, seen_through
from became_core.continual.record import EpochEnd
from became_core.continual.rng import random_generator
from became_core.continual.schedule import Schedule
from became_core.continual.step import Constraint, Optimiser, Trained
from became_core.errors import BecameError
from became_core.projection import Region

__all__ = ["Best", "Stage", "begin_stage", "epoch_batches", "train_stage"]


@dataclass(frozen=True)
class Best:
    """The model with the best validation loss of a stage so far.

    Attributes:
        loss: its validation loss.
        theta: its parameters.
        region: its region, with the scales as they were then; None if the stage has none.
    """

    loss: float
    theta: Params
    region: Region | None = None


@dataclass(frozen=True)
class Stage:
    """The state of a stage of training between two epochs, without the weights.

    Attributes:
        number: 1 or 2.
        schedule: the schedule of the remaining epochs.
        optimiser: the optimiser after the last step.
        region: the region after the last step; None if the shared weights are trained without one.
        best: the best model so far; None if there is none, or if the schedule does not restore it.
        curve: the epochs of the task so far, with those of an earlier stage.
    """

    number: int
    schedule: Schedule
    optimiser: Optimiser
    region: Region | None = None
    best: Best | None = None
    curve: tuple[EpochEnd, ...] = ()

    @property
    def epochs(self) -> int:
        """The number of epochs of the task so far."""
        return len(self.curve)


def epoch_batches(
    tasks: Sequence[Task], batch_size: int, rng: np.random.Generator, augmentation: Augmentation | None = None
) -> list[Batch]:
    """Return the batches of one epoch: each task's rows in random order, then the batches of all tasks in random order.

    The last batch of a task may be smaller. It is left out if it alone has only one sample, because that has no batch
    statistics, unless it is the only batch of the task.

    Args:
        tasks: the tasks whose training rows are used.
        batch_size: how many rows a batch has.
        rng: the generator of the random orders and of the augmentation. The augmentation is drawn last, so that the
            batches have the same rows without it.
        augmentation: how images are cropped and flipped; None for no augmentation.
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
        if len(indices) > 1 or batch_size == 1 or len(rows) == 1:
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
    """Return a stage before its first epoch.

    Args:
        learner: the learner, with the weights that the stage begins with.
        task: the task that is trained.
        number: the number of the stage, 1 or 2.
        schedule: the schedule of the stage.
        optimiser: the optimiser, whose state is set to the initial one.
        constraint: what every step must respect; its region is the one that the stage begins with.
        curve: the epochs of an earlier stage of the task.

    Raises:
        BecameError: if validation is needed and the task has no validation rows.
    """
    if schedule.needs_validation and not len(task.validation):
        raise BecameError(f"the schedule needs a validation loss, but task {task.index + 1} holds out no samples.")
    theta, region = learner.parameters(), constraint.region
    scales = region.scales if region is not None and constraint.trains_scales else {}
    # The weights of an absorbed region have gradients, which its scales are trained by, and no steps of their own.
    beneath = region.weights if region is not None and region.absorbed else frozenset()
    optimiser = optimiser.initial({name: theta[name] for name in sorted(constraint.trainable - beneath)} | scales)
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
    """Train a learner until the stage is over.

    Args:
        learner: the learner, with the weights that belong to the stage.
        tasks: the tasks whose data are trained on; the last one is the task that is learned.
        stage: the stage, before or between epochs.
        constraint: what every step must respect; the region of the stage takes the place of its region.
        batch_size: the batch size of training and validation.
        seed: the seed of the run; random draws depend on it, the task, the stage and the epoch.
        augmentation: how training images are cropped and flipped; None for no augmentation.
        after_epoch: a function that is called after every epoch with the stage and the event of the epoch.

    Returns:
        The stage at its end. The learner then has the weights of the best model if the schedule restores it, and the
        last weights otherwise.

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
    _check_finite(learner, heads_of(learner) - constraint.trainable, where)
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
    """Train on the batches of an epoch: in one call, or in one call for each if the region changes at every step."""
    region = constraint.region
    if region is None or not region.anneals:
        return learner.train(batches, rates, constraint, optimiser, rng)
    total, last = 0.0, len(batches) - 1
    for step, batch in enumerate(batches):
        assert region is not None
        # A single batch is trained in the region that the task ends with.
        constraint = replace(constraint, region=region.annealed(step / last if last else 1.0))
        loss, optimiser, region = learner.train([batch], rates[step : step + 1], constraint, optimiser, rng)
        total += loss * len(batch.indices)
    return Trained(total / sum(len(batch.indices) for batch in batches), optimiser, region)


def _check_finite(learner: Learner, untrained: frozenset[str], where: str) -> None:
    """Raise an error if a parameter is not finite; the last step may have caused it, which no loss can show.

    Args:
        learner: the learner.
        untrained: the names of the heads that no step has changed.
        where: in the run, for the message.
    """
    for name, value in learner.parameters().items():
        xp = namespace(value=value)
        if name not in untrained and not bool(xp.all(xp.isfinite(value))):
            raise BecameError(f"the parameter '{name}' is not finite after {where}; try a smaller learning rate.")
