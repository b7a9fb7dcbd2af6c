"""What a continual run reports: events while it goes, and the record it ends with.

Convention: accuracies in percent; row t of a matrix is the state after task t, NaN for tasks not yet learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["EpochEnd", "MergePath", "PathPoint", "RunRecord", "TaskEnd"]


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


@dataclass(frozen=True)
class PathPoint:
    """The truth at one alpha of a merging path: cumulative training loss, and mean test accuracy over tasks so far."""

    alpha: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class MergePath:
    """A merging path, looked at from outside: the truth along it, and both sides' losses, measured in every way.

    Attributes:
        points: the truth at each traced alpha.
        new: (slope at theta_gp, curvature) of the new task's loss along delta, by the name of how it was measured.
        old: likewise, of the old tasks' together.
    """

    points: list[PathPoint]
    new: dict[str, tuple[float, float]]
    old: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class TaskEnd:
    """What is known when a task has been learned; accuracies in percent, of each task so far.

    Attributes:
        task: its index.
        alpha: the merging coefficient, if anything was merged.
        accuracy: task-incremental.
        class_incremental_accuracy: the argmax over all heads so far.
        full: protected spaces that fill their layer's, from now on: such a weight no longer changes in stage 1.
    """

    task: int
    alpha: float | None
    accuracy: list[float]
    class_incremental_accuracy: list[float]
    full: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RunRecord:
    """All that a run has produced so far.

    Attributes:
        accuracy: [T, T], percent; [t, i] is task i after task t, NaN where i > t.
        class_incremental_accuracy: likewise, the argmax over all heads so far.
        alpha: for each task, the merging coefficient; None where nothing was merged.
        curves: for each task, its epochs, those of stage 2 after those of stage 1.
        ranks: for each task, every protected layer's (rank, width) after it.
        memory: for each task, the bytes of what is kept beside the network after it.
        paths: for each merge, the path it was on, if paths are traced.
        seconds: by phase, and in total; of a run that was interrupted, the sum over its parts.
    """

    accuracy: NDArray[np.float64]
    class_incremental_accuracy: NDArray[np.float64]
    alpha: list[float | None] = field(default_factory=list)
    curves: list[tuple[EpochEnd, ...]] = field(default_factory=list)
    ranks: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    paths: list[MergePath] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def epochs(self) -> list[int]:
        """For each task, how many epochs were trained."""
        return [len(curve) for curve in self.curves]

    @classmethod
    def empty(cls, tasks: int) -> Self:
        """Return the record of a run of so many tasks before the first."""
        return cls(np.full((tasks, tasks), np.nan), np.full((tasks, tasks), np.nan))

    def with_task(
        self,
        end: TaskEnd,
        *,
        curve: tuple[EpochEnd, ...],
        ranks: dict[str, tuple[int, int]],
        memory: int,
        path: MergePath | None,
    ) -> Self:
        """Return the record with one more task."""
        return replace(
            self,
            accuracy=_with_row(self.accuracy, end.task, end.accuracy),
            class_incremental_accuracy=_with_row(
                self.class_incremental_accuracy, end.task, end.class_incremental_accuracy
            ),
            alpha=[*self.alpha, end.alpha],
            curves=[*self.curves, curve],
            ranks=[*self.ranks, ranks],
            memory=[*self.memory, memory],
            paths=self.paths if path is None else [*self.paths, path],
        )


def _with_row(matrix: NDArray[np.float64], row: int, values: Sequence[float]) -> NDArray[np.float64]:
    result = matrix.copy()
    result[row, : len(values)] = values
    return result
