"""Metrics of a continual run, computed from its accuracy matrix.

Convention: accuracy[t, i] is the accuracy, in percent, on task i after task t was learned. It is NaN for i > t, unless
tasks that are not yet learned were scored as well. Where there are no labels it is a loss with its sign turned, so that
up is good in every matrix, and a BWT below 0 is forgetting in every unit (``Measure``).

Examples:
    >>> import numpy as np
    >>> accuracy = np.array([[90.0, np.nan], [80.0, 95.0]])
    >>> average_accuracy(accuracy), backward_transfer(accuracy), plasticity(accuracy)
    (87.5, -10.0, 92.5)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Measure", "average_accuracy", "backward_transfer", "forgetting", "forward_transfer", "plasticity"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """What a run is measured by: accuracy, or a loss where there are no classes.

    Attributes:
        unit: "%" for accuracy, or the unit of the loss.

    Examples:
        >>> Measure("RMSE").heading, Measure().heading
        ('−RMSE', 'ACC')
    """

    unit: str = "%"

    @property
    def is_accuracy(self) -> bool:
        """Whether it is accuracy, which class-incremental scores, points and the bounds 0 and 100 come with."""
        return self.unit == "%"

    @property
    def word(self) -> str:
        """What the matrix holds, as a word of a sentence."""
        return "accuracy" if self.is_accuracy else f"−{self.unit}"

    @property
    def name(self) -> str:
        """What the matrix holds, with its unit."""
        return "accuracy, %" if self.is_accuracy else self.word

    @property
    def heading(self) -> str:
        """The heading of the mean over all tasks at the end."""
        return "ACC" if self.is_accuracy else self.name

    @property
    def digits(self) -> int:
        """How many decimals of a score matter."""
        return 2 if self.is_accuracy else 3

    def matrix(self, accuracy: Matrix, loss: Matrix) -> Matrix:
        """Return the matrix of which scores are computed, in which up is good.

        Args:
            accuracy: [T, T], in percent.
            loss: [T, T], in its natural unit.

        Returns:
            The accuracy, or the loss with its sign turned.

        Examples:
            >>> Measure("RMSE").matrix(np.array([[90.0]]), np.array([[2.0]]))
            array([[-2.]])
        """
        return accuracy if self.is_accuracy else -loss


def average_accuracy(accuracy: Matrix) -> float:
    """Return ACC: the mean over all tasks of the accuracy at the end (Lopez-Paz & Ranzato 2017)."""
    return float(np.mean(accuracy[-1]))


def backward_transfer(accuracy: Matrix) -> float:
    """Return BWT: the mean over all tasks but the last of (accuracy at the end - accuracy when just learned).

    It is 0 for a single task (Lopez-Paz & Ranzato 2017).
    """
    if len(accuracy) < 2:
        return 0.0
    return float(np.mean(accuracy[-1, :-1] - np.diagonal(accuracy)[:-1]))


def forgetting(accuracy: Matrix) -> float:
    """Return forgetting: the mean over all tasks but the last of (best accuracy so far - accuracy at the end).

    It is 0 for a single task. The best accuracy may be the one at the end, so that no task counts as less than 0. Where
    tasks ahead were scored, it may also be from before the task was learned.
    Chaudhry et al. (2018) leave the last row out of the best, so that a task that has improved counts as negative.
    """
    if len(accuracy) < 2:
        return 0.0
    return float(np.mean(np.nanmax(accuracy[:, :-1], axis=0) - accuracy[-1, :-1]))


def forward_transfer(accuracy: Matrix) -> float | None:
    """Return FWT: the mean accuracy on tasks that are not yet learned (Diaz-Rodriguez 2018).

    It is None if it is not defined: for a single task, and if these accuracies are NaN, as they are where every task
    has a head of its own, which nothing has trained yet.
    """
    ahead = accuracy[np.triu_indices(len(accuracy), k=1)]
    return float(np.mean(ahead)) if len(ahead) and np.all(np.isfinite(ahead)) else None


def plasticity(accuracy: Matrix) -> float:
    """Return plasticity: the mean over tasks of the accuracy just after the task was learned."""
    return float(np.mean(np.diagonal(accuracy)))
