"""The metrics of a continual run, computed by explicit loops.

Convention: accuracy[t][i] is the accuracy on task i after task t, in percent.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["average_accuracy", "backward_transfer", "class_incremental", "forgetting", "plasticity", "task_incremental"]

Matrix = NDArray[np.float64]


def average_accuracy(accuracy: Matrix) -> float:
    """Return the mean accuracy over tasks, after the last task."""
    last = len(accuracy) - 1
    return sum(float(accuracy[last][i]) for i in range(len(accuracy))) / len(accuracy)


def backward_transfer(accuracy: Matrix) -> float:
    """Return the mean, over all tasks except the last, of the final accuracy minus the accuracy when it was learned."""
    last = len(accuracy) - 1
    return sum(float(accuracy[last][i] - accuracy[i][i]) for i in range(last)) / last


def forgetting(accuracy: Matrix) -> float:
    """Return the mean, over all tasks except the last, of the best accuracy minus the final accuracy.

    The best may be from before the task was learned, where that was scored: it is NaN where it was not.
    """
    last = len(accuracy) - 1
    scored = [[float(row[i]) for row in accuracy if not np.isnan(row[i])] for i in range(last)]
    lost = [max(scores) - float(accuracy[last][i]) for i, scores in enumerate(scored)]
    return sum(lost) / last


def plasticity(accuracy: Matrix) -> float:
    """Return the mean over tasks of the accuracy directly after the task was learned."""
    return sum(float(accuracy[t][t]) for t in range(len(accuracy))) / len(accuracy)


def task_incremental(logits: NDArray[np.float64], targets: NDArray[np.int64], task: int) -> float:
    """Return the percentage of samples for which the task's own head has its largest logit at the label.

    Args:
        logits: of all heads, [samples, tasks, classes].
        targets: labels within the task, [samples].
        task: the number of the task that all samples belong to.
    """
    hits = [int(np.argmax(row[task])) == int(target) for row, target in zip(logits, targets, strict=True)]
    return 100 * sum(hits) / len(hits)


def class_incremental(logits: NDArray[np.float64], targets: NDArray[np.int64], task: int, seen: int) -> float:
    """Return the percentage of samples whose largest logit, over the heads so far, is that of their task and label.

    Args:
        logits: of all heads, [samples, tasks, classes].
        targets: labels within the task, [samples].
        task: the number of the task that all samples belong to.
        seen: the number of tasks learned so far, whose heads are compared.
    """
    hits = []
    for row, target in zip(logits, targets, strict=True):
        candidates = [(float(row[head, label]), head, label) for head in range(seen) for label in range(row.shape[1])]
        _, head, label = max(candidates)
        hits.append((head, label) == (task, int(target)))
    return 100 * sum(hits) / len(hits)
