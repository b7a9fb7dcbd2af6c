import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.continual import (
    SGD,
    Annealed,
    Augmentation,
    Batch,
    Constraint,
    EpochEnd,
    Patience,
    Schedule,
    Task,
    Trained,
    Training,
    build_method,
    learn,
)
from became_core.continual.evaluation import mean_loss
from became_core.continual.training import begin_stage, epoch_batches, train_stage
from became_core.projection.gates import GatedRegion
from reference.learner import ReferenceLearner
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=2, validation=0.2)


def task_of(index: int, size: int) -> Task:
    rows = 1000 * index + np.arange(size)
    return Task(index=index, classes=(0, 1), train=rows, validation=rows[:0], test=rows[:0])


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3), batch_size=st.integers(2, 8), seed=st.integers(0, 9))
def test_batches_cover_every_row_once(sizes: list[int], batch_size: int, seed: int) -> None:
    tasks = [task_of(index, size) for index, size in enumerate(sizes)]
    batches = epoch_batches(tasks, batch_size, np.random.default_rng(seed))
    counts = Counter(int(row) for batch in batches for row in batch.indices)
    assert set(counts.values()) <= {1}
    for task in tasks:
        rows = [row for row in task.train.tolist() if row in counts]
        # A remainder of one sample has no batch statistics; a task of one sample has nothing else.
        dropped = 1 if len(task.train) % batch_size == 1 and len(task.train) > 1 else 0
        assert len(rows) == len(task.train) - dropped
    for batch in batches:
        assert set(batch.indices.tolist()) <= set(tasks[batch.task].train.tolist())
        assert 1 <= len(batch.indices) <= batch_size


def test_batches_are_a_function_of_the_generator() -> None:
    tasks = [task_of(0, 20), task_of(1, 20)]

    def rows(seed: int) -> list[list[int]]:
        return [batch.indices.tolist() for batch in epoch_batches(tasks, 6, np.random.default_rng(seed))]

    assert rows(0) == rows(0) != rows(1)


def test_augmentation_does_not_change_the_rows_of_batches() -> None:
    tasks = [task_of(0, 20), task_of(1, 20)]
    plain = epoch_batches(tasks, 6, np.random.default_rng(0))
    augmented, again, other = (
        epoch_batches(tasks, 6, np.random.default_rng(seed), Augmentation()) for seed in (0, 0, 1)
    )
    assert all(batch.views is None for batch in plain)
    views = []
    for batch, same, without in zip(augmented, again, plain, strict=True):
        assert batch.task == without.task
        np.testing.assert_array_equal(batch.indices, without.indices)
        assert batch.views is not None
        assert same.views is not None
        assert len(batch.views.offsets) == len(batch.views.flips) == len(batch.indices)
        np.testing.assert_array_equal(batch.views.offsets, same.views.offsets)
        np.testing.assert_array_equal(batch.views.flips, same.views.flips)
        views.append(batch.views.offsets.tolist())
    assert views != [batch.views.offsets.tolist() for batch in other if batch.views is not None]
    assert len({str(view) for view in views}) == len(views)  # No two batches have the same views.


def test_batches_of_several_tasks_are_mixed() -> None:
    batches = epoch_batches([task_of(0, 40), task_of(1, 40)], 4, np.random.default_rng(0))
    order = [batch.task for batch in batches]
    assert sorted(order) != order != sorted(order, reverse=True)


def stage(
    learner: ReferenceLearner,
    schedule: Schedule,
    observed: list[EpochEnd] | None = None,
    *,
    task: Task = STREAM.tasks[0],
) -> int:
    constraint = Constraint(frozenset(learner.parameters()))
    begun = begin_stage(learner, task, 1, schedule, SGD(), constraint)
    events: list[EpochEnd] = [] if observed is None else observed
    ended = train_stage(
        learner, [task], begun, constraint, batch_size=16, seed=0, after_epoch=lambda stage, event: events.append(event)
    )
    return ended.epochs


def test_every_epoch_is_observed() -> None:
    observed: list[EpochEnd] = []
    assert stage(ReferenceLearner(STREAM), Annealed(0.1, 4), observed) == 4
    assert [(end.task, end.stage, end.epoch, end.epochs) for end in observed] == [(0, 1, k, 4) for k in (1, 2, 3, 4)]
    assert observed[-1].loss < observed[0].loss
    assert observed[-1].rate == pytest.approx(0, abs=1e-15)
    assert all(math.isnan(end.validation_loss) for end in observed)


def test_the_best_validation_model_is_restored() -> None:
    observed: list[EpochEnd] = []
    learner = ReferenceLearner(STREAM)
    # So high a rate that the validation loss goes up and down.
    stage(learner, Patience(lr=0.8, patience=3, minimum=0.3, epochs=25), observed)
    losses = [end.validation_loss for end in observed]
    assert losses[-1] > min(losses)
    assert mean_loss(learner, 0, STREAM.tasks[0].validation, 16) == pytest.approx(min(losses), rel=1e-12)


def test_the_last_model_is_used_if_the_schedule_does_not_restore_the_best() -> None:
    observed: list[EpochEnd] = []
    learner = ReferenceLearner(STREAM)
    stage(learner, Patience(lr=0.8, patience=3, minimum=0.3, epochs=25, restores_best=False), observed)
    last = observed[-1].validation_loss
    assert last > min(end.validation_loss for end in observed)
    assert mean_loss(learner, 0, STREAM.tasks[0].validation, 16) == pytest.approx(last, rel=1e-12)


def test_patience_without_validation_rows_is_an_error() -> None:
    with pytest.raises(BecameError, match=r"^the schedule needs a validation loss, but task 1 holds out no samples\.$"):
        stage(ReferenceLearner(STREAM), Patience(lr=0.1), task=task_of(0, 10))


def test_divergence_is_an_error() -> None:
    message = (
        r"^the training loss became (nan|inf) in task 1, stage 1, epoch \d+; try a smaller learning rate or penalty\.$"
    )
    with pytest.raises(BecameError, match=message):
        stage(ReferenceLearner(STREAM), Annealed(1e200, 20))


class ThrownOut(ReferenceLearner):
    """A learner whose last step, after the last loss, makes a weight infinite."""

    def train(self, *arguments: Any) -> Trained:
        trained = super().train(*arguments)
        parameters = self.parameters()
        parameters["fc2.weight"][0, 0] = math.inf
        self.assign(parameters)
        return trained


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(
        BecameError, match=r"^the parameter 'fc2\.weight' is not finite after task 1, stage 1, epoch 1; "
    ):
        stage(ThrownOut(STREAM), Annealed(0.1, 1))


class Steepness(ReferenceLearner):
    """A learner that keeps how steep its gates were at each step."""

    def train(self, batches: Sequence[Batch], rates: Any, constraint: Constraint, *others: Any) -> Trained:
        assert isinstance(constraint.region, GatedRegion)
        vars(self).setdefault("seen", []).append(float(constraint.region.steepness))
        return super().train(batches, rates, constraint, *others)


@pytest.mark.parametrize(("batch_size", "expected"), [(100, [400.0]), (32, [1 / 400, 200.00125, 400.0])])
def test_the_gates_of_hat_are_steepest_at_an_epochs_end(batch_size: int, expected: list[float]) -> None:
    """Also if its first batch is its last, which would else be trained with gates that are all half open."""
    learner = Steepness(STREAM)
    training = Training(Annealed(0.1, 1), Annealed(0.1, 1), batch_size=batch_size)
    learn(learner, STREAM, build_method("hat", {"hat_sharpness": 400.0}), training, seed=0)
    np.testing.assert_allclose(vars(learner)["seen"], expected * len(STREAM.tasks))
