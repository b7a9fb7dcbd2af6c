"""Training: the settings of a run, and one stage of it with batches, schedule, validation and best-model selection.

The same for every method and backend.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Params, namespace
from became_core.continual.evaluation import mean_loss
from became_core.continual.learner import Batch, Constraint, Learner, Trained
from became_core.continual.optimisers import SGD, Optimiser
from became_core.continual.regions import reparametrised
from became_core.continual.schedule import Schedule
from became_core.continual.seeding import random_stream
from became_core.continual.stream import Task
from became_core.errors import BecameError
from became_core.projection import Region

__all__ = ["EpochEnd", "Training", "epoch_batches", "train_stage"]


@dataclass(frozen=True)
class Training:
    """How every method trains.

    Attributes:
        stage1: the schedule under constraint.
        stage2: the schedule of methods that go on without one.
        optimiser: what turns gradients into steps; it begins anew with every stage.
        batch_size: of training, and of evaluation, since batch statistics make accuracy depend on it.
        projector_samples: training samples of a task that the projector's memory is made from; all if None.
        curvature_samples: training samples for Fisher information and directional curvature; all if None.
        path_alphas: where the true loss is traced on every merging path; nowhere if empty.
    """

    stage1: Schedule
    stage2: Schedule
    optimiser: Optimiser = field(default_factory=SGD)
    batch_size: int = 64
    projector_samples: int | None = 125
    curvature_samples: int | None = None
    path_alphas: tuple[float, ...] = ()


@dataclass(frozen=True)
class EpochEnd:
    """What is known when an epoch ends; ``validation_loss`` is NaN where the schedule needs none."""

    task: int
    stage: int
    epoch: int
    epochs: int
    loss: float
    rate: float
    validation_loss: float


def epoch_batches(tasks: Sequence[Task], batch_size: int, stream: np.random.Generator) -> list[Batch]:
    """Return one epoch's batches: each task's rows shuffled and cut, then the batches of all tasks shuffled.

    A last, smaller batch is kept unless it would hold one sample alone, which has no batch statistics.
    """
    batches = [batch for task in tasks for batch in _task_batches(task, batch_size, stream)]
    return [batches[position] for position in stream.permutation(len(batches))] if len(tasks) > 1 else batches


def _task_batches(task: Task, batch_size: int, stream: np.random.Generator) -> Iterator[Batch]:
    rows = stream.permutation(task.train)
    for start in range(0, len(rows), batch_size):
        indices = rows[start : start + batch_size]
        if len(indices) > 1 or len(rows) == 1:
            yield Batch(task.index, indices)


def train_stage(
    learner: Learner,
    tasks: Sequence[Task],
    schedule: Schedule,
    constraint: Constraint,
    *,
    stage: int,
    optimiser: Optimiser,
    batch_size: int,
    seed: int,
    observe: Callable[[EpochEnd], None],
) -> tuple[int, Region | None]:
    """Train a learner on the last of these tasks (on all of them, if several are given).

    Returns:
        The epochs taken, and the constraint's region as it came out of training.

    Raises:
        BecameError: if the loss is no longer finite, or validation is needed and the task has no validation rows.
    """
    task = tasks[-1]
    if schedule.needs_validation and not len(task.validation):
        raise BecameError(f"the schedule needs a validation loss, but task {task.index + 1} holds out no samples.")
    best: tuple[Params, Region | None] | None = None
    best_loss = math.inf
    theta, region = learner.parameters(), constraint.region
    scales = region.scales if region is not None and constraint.trains_scales else {}
    optimiser = optimiser.begun({name: theta[name] for name in sorted(constraint.trainable)} | scales)
    while not schedule.finished:
        key = (task.index, stage, schedule.epoch)
        batches = epoch_batches(tasks, batch_size, random_stream(seed, "batches", *key))
        rates = schedule.rates(len(batches))
        draws = random_stream(seed, "dropout", *key)
        loss, optimiser, region = _train_epoch(learner, batches, rates, constraint, optimiser, draws)
        constraint = replace(constraint, region=region)
        if not math.isfinite(loss):
            raise BecameError(
                f"the training loss became {loss} in task {task.index + 1}, stage {stage}, "
                f"epoch {schedule.epoch + 1}; try a smaller learning rate or penalty."
            )
        validation_loss = math.nan
        if schedule.needs_validation:
            with reparametrised(learner, region):
                validation_loss = mean_loss(learner, task.index, task.validation, batch_size)
            if schedule.restores_best and validation_loss < best_loss:
                best, best_loss = (learner.parameters(), region), validation_loss
        schedule = schedule.advance(validation_loss)
        observe(EpochEnd(task.index, stage, schedule.epoch, schedule.epochs, loss, float(rates[-1]), validation_loss))
    if best is not None:
        learner.assign(best[0])
        region = best[1]
    _check_finite(learner, f"task {task.index + 1}, stage {stage}")
    return schedule.epoch, region


def _train_epoch(
    learner: Learner,
    batches: Sequence[Batch],
    rates: NDArray[np.float64],
    constraint: Constraint,
    optimiser: Optimiser,
    draws: np.random.Generator,
) -> Trained:
    """Train on these batches: all at once, or, in a region that changes from step to step, one after the other."""
    region = constraint.region
    if region is None or not region.anneals:
        return learner.train(batches, rates, constraint, optimiser, draws)
    total, last = 0.0, max(len(batches) - 1, 1)
    for step, batch in enumerate(batches):
        assert region is not None
        constraint = replace(constraint, region=region.annealed(step / last))
        loss, optimiser, region = learner.train([batch], rates[step : step + 1], constraint, optimiser, draws)
        total += loss * len(batch.indices)
    return Trained(total / sum(len(batch.indices) for batch in batches), optimiser, region)


def _check_finite(learner: Learner, where: str) -> None:
    """Raise if the last step, after the last loss was seen, has thrown a weight out of the numbers."""
    for name, value in learner.parameters().items():
        xp = namespace(value=value)
        if not bool(xp.all(xp.isfinite(value))):
            raise BecameError(f"the parameter '{name}' is not finite after {where}; try a smaller learning rate.")
