"""Metrics of a continual run, from its accuracy matrix.

Convention: accuracy[t, i] is the accuracy, in percent, on task i after task t was learned; NaN where i > t.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["average_accuracy", "backward_transfer", "forgetting", "forward_transfer", "plasticity"]

Matrix = NDArray[np.float64]


def average_accuracy(accuracy: Matrix) -> float:
    """Return ACC: the mean over tasks after the last one (Lopez-Paz & Ranzato 2017)."""
    return float(np.mean(accuracy[-1]))


def backward_transfer(accuracy: Matrix) -> float:
    """Return BWT: the mean over all tasks but the last of (accuracy at the end - accuracy when just learned)."""
    if len(accuracy) < 2:
        return 0.0
    return float(np.mean(accuracy[-1, :-1] - np.diagonal(accuracy)[:-1]))


def forgetting(accuracy: Matrix) -> float:
    """Return forgetting: the mean over all tasks but the last of (best accuracy so far - accuracy at the end)."""
    if len(accuracy) < 2:
        return 0.0
    return float(np.mean(np.nanmax(accuracy[:, :-1], axis=0) - accuracy[-1, :-1]))


def forward_transfer(accuracy: Matrix) -> float | None:
    """Return FWT: the mean accuracy on tasks not yet learned (Diaz-Rodriguez 2018).

    None where it is not defined: of one task, and where a task has a head of its own, which nothing has trained yet.
    """
    ahead = accuracy[np.triu_indices(len(accuracy), k=1)]
    return float(np.mean(ahead)) if len(ahead) and np.all(np.isfinite(ahead)) else None


def plasticity(accuracy: Matrix) -> float:
    """Return plasticity: the mean over tasks of the accuracy just after the task was learned."""
    return float(np.mean(np.diagonal(accuracy)))
