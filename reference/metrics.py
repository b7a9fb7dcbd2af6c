"""The metrics of a continual run, by explicit loops.

Convention: accuracy[t][i] is the accuracy on task i after task t; all in percent.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["average_accuracy", "backward_transfer", "class_incremental", "forgetting", "plasticity", "task_incremental"]

Matrix = NDArray[np.float64]


def average_accuracy(accuracy: Matrix) -> float:
    """Return the mean over tasks after the last one."""
    last = len(accuracy) - 1
    return sum(float(accuracy[last][i]) for i in range(len(accuracy))) / len(accuracy)


def backward_transfer(accuracy: Matrix) -> float:
    """Return the mean over tasks but the last of what each gained since it was learned."""
    last = len(accuracy) - 1
    return sum(float(accuracy[last][i] - accuracy[i][i]) for i in range(last)) / last


def forgetting(accuracy: Matrix) -> float:
    """Return the mean over tasks but the last of what each lost since it was best."""
    last = len(accuracy) - 1
    lost = [max(float(accuracy[t][i]) for t in range(i, last + 1)) - float(accuracy[last][i]) for i in range(last)]
    return sum(lost) / last


def plasticity(accuracy: Matrix) -> float:
    """Return the mean over tasks of the accuracy just after each was learned."""
    return sum(float(accuracy[t][t]) for t in range(len(accuracy))) / len(accuracy)


def task_incremental(logits: NDArray[np.float64], targets: NDArray[np.int64], task: int) -> float:
    """Return the share of samples whose own head [samples, tasks, classes] is largest at their label in the task."""
    hits = [int(np.argmax(row[task])) == int(target) for row, target in zip(logits, targets, strict=True)]
    return 100 * sum(hits) / len(hits)


def class_incremental(logits: NDArray[np.float64], targets: NDArray[np.int64], task: int, seen: int) -> float:
    """Return the share of samples whose largest logit, over the heads seen so far, is their class of their own task."""
    hits = []
    for row, target in zip(logits, targets, strict=True):
        places = [(float(row[head, at]), head, at) for head in range(seen) for at in range(row.shape[1])]
        _, head, at = max(places)
        hits.append((head, at) == (task, int(target)))
    return 100 * sum(hits) / len(hits)
