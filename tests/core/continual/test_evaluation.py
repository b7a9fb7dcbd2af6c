from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from became_core import BecameError
from became_core.continual.data import Indices, chunks
from became_core.continual.evaluation import accuracies, mean_loss
from became_core.continual.rng import random_generator
from became_core.curvature import Categorical
from reference.formulas import cross_entropy
from reference.learner import ReferenceLearner
from reference.metrics import class_incremental, task_incremental
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_accuracies_agree_with_explicit_loops(count: int) -> None:
    learner = ReferenceLearner(STREAM)
    within, among_all, *_ = accuracies(learner, STREAM.tasks[:count], batch_size=7)
    for task in STREAM.tasks[:count]:
        logits, targets = learner.logits(task.test, 1000), STREAM.targets[task.test]
        assert within[task.index] == pytest.approx(task_incremental(logits, targets, task.index))
        assert among_all[task.index] == pytest.approx(class_incremental(logits, targets, task.index, count))


def test_both_accuracies_of_a_single_task_are_equal() -> None:
    within, among_all, *_ = accuracies(ReferenceLearner(STREAM), STREAM.tasks[:1], batch_size=7)
    assert within == among_all


def test_class_incremental_accuracy_is_at_most_task_incremental_accuracy() -> None:
    within, among_all, *_ = accuracies(ReferenceLearner(STREAM), STREAM.tasks, batch_size=7)
    assert all(hard <= easy for easy, hard in zip(within, among_all, strict=True))


class Telling(ReferenceLearner):
    """A learner that favours the heads of the tasks in a batch, as statistics of a batch may."""

    mixes_samples = True

    def logits(self, indices: Indices, batch_size: int, heads: slice = slice(None)) -> NDArray[np.float64]:
        """Return logits that depend on which tasks the samples of a batch are of."""
        own = super().logits(indices, batch_size)
        of_task = np.stack([np.isin(indices, task.test) for task in STREAM.tasks], axis=1)  # [samples, tasks]
        for part in chunks(np.arange(len(indices)), batch_size):
            own[part] += 1000 * of_task[part].mean(axis=0)[None, :, None]
        return own[:, heads]


def test_class_incremental_accuracy_is_of_mixed_batches_where_a_batch_would_tell_the_task() -> None:
    """Once the batches are mixed, the accuracy is that of explicit loops over the logits of these batches."""
    learner, tasks = Telling(STREAM), STREAM.tasks
    within, among_all, *_ = accuracies(learner, tasks, batch_size=7)
    rows = np.concatenate([task.test for task in tasks])
    order = random_generator(0, "mixed-evaluation", len(tasks)).permutation(len(rows))
    logits = dict(zip(rows[order].tolist(), learner.logits(rows[order], 7), strict=True))
    for task in tasks:
        targets = STREAM.targets[task.test]
        mixed = np.stack([logits[row] for row in task.test.tolist()])
        assert among_all[task.index] == pytest.approx(class_incremental(mixed, targets, task.index, len(tasks)))
        alone = learner.logits(task.test, 7)
        assert within[task.index] == pytest.approx(task_incremental(alone, targets, task.index))
    learner.mixes_samples = False
    told = accuracies(learner, tasks, batch_size=7)
    assert told[0] == told[1] == within  # a batch of one task has told which one it is
    assert np.mean(among_all) < np.mean(within)


def test_mean_loss_is_that_of_the_tasks_head() -> None:
    learner = ReferenceLearner(STREAM)
    rows = STREAM.tasks[1].train
    for task in range(3):
        expected = cross_entropy(learner.logits(rows, 1000)[:, task], STREAM.targets[rows])
        assert mean_loss(learner, task, rows, batch_size=7) == pytest.approx(expected, rel=1e-12)
    assert isinstance(mean_loss(learner, 0, rows, batch_size=7), float)
    assert np.isfinite(mean_loss(learner, 0, rows, batch_size=len(rows)))


def test_only_heads_that_count_are_asked_for() -> None:
    """A run over many tasks would otherwise compute, for every sample it scores, the heads of tasks to come."""
    asked: list[slice] = []

    class Asked(ReferenceLearner):
        def logits(self, indices: Indices, batch_size: int, heads: slice = slice(None)) -> NDArray[np.float64]:
            asked.append(heads)
            return super().logits(indices, batch_size, heads)

    learner = Asked(STREAM)
    accuracies(learner, STREAM.tasks[:2], batch_size=7)
    mean_loss(learner, 1, STREAM.tasks[1].train, batch_size=7)
    assert asked == [slice(2), slice(2), slice(1, 2)]


def test_a_task_without_test_samples_is_an_error() -> None:
    empty = replace(STREAM.tasks[1], test=STREAM.tasks[1].test[:0])
    with pytest.raises(BecameError, match=r"^task 2 has no test samples to score it on\.$"):
        accuracies(ReferenceLearner(STREAM), [STREAM.tasks[0], empty], batch_size=7)


class Positions(ReferenceLearner):
    """A learner with logits and a label for every one of six positions; six samples of each task are test samples."""

    likelihood = Categorical(by="token", ignored=0)

    def logits(self, indices: Indices, batch_size: int, heads: slice = slice(None)) -> NDArray[np.float64]:
        """Return [samples, heads, positions, classes]."""
        draw = np.random.default_rng(0).normal(size=(len(STREAM.targets), 3, 6, 4))
        return draw[indices][:, heads]

    def targets(self, indices: Indices) -> Indices:
        """Return [samples, positions]."""
        return np.random.default_rng(1).integers(0, 4, (len(STREAM.targets), 6))[indices]


def test_labels_of_positions_are_counted_one_by_one_where_every_task_has_a_head_of_its_own() -> None:
    """As many samples as positions, or more; a label that does not count is left out."""
    for samples in (6, 8):
        tasks = [replace(task, test=task.test[:samples]) for task in STREAM.tasks]
        learner = Positions(STREAM)
        within, among_all, loss, _ = accuracies(learner, tasks, batch_size=7)
        for task in tasks:
            rows, own, every = task.test, [], []
            logits, targets, losses = learner.logits(rows, 1000), learner.targets(rows), []
            for sample, place in np.argwhere(targets != 0):
                of_heads, label = logits[sample, :, place], targets[sample, place]
                own.append(of_heads[task.index].argmax() == label)
                every.append(of_heads.ravel().argmax() == task.index * 4 + label)
                losses.append(cross_entropy(of_heads[task.index][None], np.array([label])))
            assert within[task.index] == pytest.approx(100 * np.mean(own))
            assert among_all[task.index] == pytest.approx(100 * np.mean(every))
            assert loss[task.index] == pytest.approx(learner.likelihood.natural(float(np.mean(losses)), 4))
            assert mean_loss(learner, task.index, rows, batch_size=7) == pytest.approx(np.mean(losses))
