"""What a learner reaches at its present weights: accuracies, losses and correlations, on test samples or on any rows.

Convention: accuracies are in percent. Task-incremental accuracy predicts among the classes of the sample's task;
class-incremental accuracy predicts among the classes of all tasks so far, by the argmax over all their heads. Losses
are means over samples.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from became_core.arrays import Array, device, namespace
from became_core.continual.correlation import correlation, correlation_sums
from became_core.continual.data import Indices, Task, chunks
from became_core.continual.learner import Learner, seen_through
from became_core.continual.rng import random_generator
from became_core.errors import BecameError
from became_core.projection import View

__all__ = ["Evaluation", "accuracies", "mean_loss"]


class Evaluation(NamedTuple):
    """What a learner reaches on the test samples of some tasks.

    Attributes:
        accuracy: the task-incremental accuracy of each task, in percent; NaN if targets are no labels.
        class_incremental_accuracy: the class-incremental one; that is the task-incremental one if tasks share a head.
        loss: the loss of each task by its own head, in the natural unit of the likelihood and of the data.
        correlation: where outputs predict numbers, their correlation with the targets of each task, as
            ``correlation`` defines it; empty elsewhere.
    """

    accuracy: list[float]
    class_incremental_accuracy: list[float]
    loss: list[float]
    correlation: list[float]


def accuracies(
    learner: Learner, tasks: Sequence[Task], batch_size: int, views: Mapping[int, View] | None = None
) -> Evaluation:
    """Return what is reached on the test samples of these tasks: accuracies, losses and correlations.

    There is one pass over the test samples of all tasks for the shared weights, and one for every task that has a view,
    because the head of that task works with other weights.

    For task-incremental accuracy a batch holds samples of one task, as in published code. If the network normalises by
    the statistics of a batch, such a batch tells which task it is of, and class-incremental accuracy would profit from
    it. For that accuracy the samples of all tasks are therefore mixed, in an order that depends on the number of tasks
    alone, and the passes are made once more.

    Args:
        learner: the learner that is scored.
        tasks: all tasks that have been learned, in order.
        batch_size: how many samples a batch has.
        views: the views of those tasks that have one, by task number.

    Raises:
        BecameError: if a task has no test samples.
    """
    for task in tasks:
        if not len(task.test):
            raise BecameError(f"task {task.index + 1} has no test samples to score it on.")
    if learner.shares_head:
        return _by_one_head(learner, tasks, batch_size)
    parts = [task.test for task in tasks]
    logits = mixed = _logits_of_heads(learner, parts, len(tasks), batch_size, views or {})
    if learner.mixes_samples and learner.likelihood.has_labels and len(tasks) > 1:
        rows = np.concatenate(parts)
        order = random_generator(0, "mixed-evaluation", len(tasks)).permutation(len(rows))
        (shuffled,) = _logits_of_heads(learner, [rows[order]], len(tasks), batch_size, views or {})
        places = np.split(np.argsort(order), np.cumsum([len(part) for part in parts])[:-1])
        mixed = [_rows_of(shuffled, place) for place in places]
    result = Evaluation([], [], [], [])
    for task, of_heads, of_heads_mixed in zip(tasks, logits, mixed, strict=True):
        targets = learner.targets(task.test)
        own = of_heads[:, task.index, ...]
        mean, width = float(learner.likelihood.mean_loss(own, targets)), int(own.shape[-1])
        result.loss.append(learner.target_scale * learner.likelihood.natural(mean, width))
        if learner.likelihood.predicts_numbers:
            result.correlation.append(correlation(correlation_sums(own, targets)))
        if not learner.likelihood.has_labels:
            result.accuracy.append(math.nan)
            result.class_incremental_accuracy.append(math.nan)
            continue
        result.accuracy.append(_percent(learner.likelihood.hits(own, targets)))
        hits = learner.likelihood.hits(_in_a_row(of_heads_mixed), targets, first=task.index * width)
        result.class_incremental_accuracy.append(_percent(hits))
    return result


def _in_a_row(of_heads: Array) -> Array:
    """Return logits [samples, heads, ..., classes] with the classes of all heads in a row, [samples, ..., all]."""
    xp, axes = namespace(logits=of_heads), len(of_heads.shape)
    beside = xp.permute_dims(of_heads, (0, *range(2, axes - 1), 1, axes - 1))
    return xp.reshape(beside, (*beside.shape[:-2], of_heads.shape[1] * of_heads.shape[-1]))


def _by_one_head(learner: Learner, tasks: Sequence[Task], batch_size: int) -> Evaluation:
    """Return what a learner reaches whose tasks share a head."""
    result, likelihood = Evaluation([], [], [], []), learner.likelihood
    for task in tasks:
        total = units = correct = counted = 0.0
        moments: Any = 0.0
        for outputs, targets in _own_batches_of_one_head(learner, task.test, batch_size):
            total, units = total + float(likelihood.loss(outputs, targets)), units + likelihood.count(targets)
            hits, labels = likelihood.hits(outputs, targets)
            correct, counted = correct + hits, counted + labels
            if likelihood.predicts_numbers:
                moments = moments + correlation_sums(outputs, targets)
        sums = [total, units, correct, counted, *np.ravel(moments).tolist()]
        sums = _of_all_processes(learner, len(chunks(task.test, batch_size)), outputs, sums)
        total, units, correct, counted = sums[:4]
        width = int(outputs.shape[-1])
        result.loss.append(learner.target_scale * likelihood.natural(total / units, width))
        if likelihood.predicts_numbers:
            result.correlation.append(correlation(np.reshape(sums[4:], (6, width))))
        accuracy = _percent((correct, counted))
        result.accuracy.append(accuracy)
        result.class_incremental_accuracy.append(accuracy)
    return result


def _own_batches_of_one_head(learner: Learner, rows: Indices, batch_size: int) -> Iterator[tuple[Array, Array]]:
    """Yield the outputs of the shared head, and the targets, a batch at a time, because logits of text are many."""
    for part in learner.share.own(chunks(rows, batch_size)):
        yield learner.logits(part, batch_size)[:, 0, ...], learner.targets(part)


def _of_all_processes(learner: Learner, parts: int, like: Array, sums: list[float]) -> list[float]:
    """Return sums over this process's own parts as sums over all."""
    exchange = learner.share.exchange(parts)
    if exchange is None:
        return sums
    xp: Any = namespace(like=like)
    total = exchange.total({"sums": xp.asarray(sums, dtype=xp.float64, device=device(like))})["sums"]
    return [float(value) for value in total]


def _logits_of_heads(
    learner: Learner, parts: Sequence[Indices], heads: int, batch_size: int, views: Mapping[int, View]
) -> list[Array]:
    """Return the logits [samples, heads, ..., classes] of each part of the rows, of so many heads.

    They are by the weights of the head's task. Batches do not cross from one part to the next.
    """
    logits = [learner.logits(rows, batch_size, slice(heads)) for rows in parts]
    if not views:
        return logits
    by_head = [[of_part[:, head : head + 1, ...] for head in range(heads)] for of_part in logits]
    for head, view in views.items():
        with seen_through(learner, view):
            for of_part, rows in zip(by_head, parts, strict=True):
                of_part[head] = learner.logits(rows, batch_size, slice(head, head + 1))
    return [namespace(first=of_part[0]).concat(of_part, axis=1) for of_part in by_head]


def _rows_of(logits: Array, places: Indices) -> Array:
    xp: Any = namespace(logits=logits)
    return xp.take(logits, xp.asarray(places, device=device(logits)), axis=0)


def _percent(hits: tuple[float, float]) -> float:
    """Return the percentage of the labels that are hit; NaN if none counts."""
    right, counted = hits
    return 100 * right / counted if counted else math.nan


def mean_loss(learner: Learner, task: int, indices: Indices, batch_size: int) -> float:
    """Return the mean loss of a task's head on these samples, in evaluation, in nats."""
    if not learner.shares_head:
        logits = learner.logits(indices, batch_size, slice(task, task + 1))[:, 0, ...]
        return float(learner.likelihood.mean_loss(logits, learner.targets(indices)))
    total = units = 0.0
    for outputs, targets in _own_batches_of_one_head(learner, indices, batch_size):
        total += float(learner.likelihood.loss(outputs, targets))
        units += learner.likelihood.count(targets)
    total, units = _of_all_processes(learner, len(chunks(indices, batch_size)), outputs, [total, units])
    return total / units
