"""What a continual run reports: events while it goes, and the record it ends with.

Convention: accuracies in percent; row t of a matrix is the state after task t, NaN for tasks not yet learned.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["PathPoint", "RunRecord", "TaskEnd"]


@dataclass(frozen=True)
class PathPoint:
    """The truth at one alpha of a merging path: cumulative training loss, and mean test accuracy over tasks so far."""

    alpha: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class TaskEnd:
    """What is known when a task has been learned; accuracies in percent, of each task so far."""

    task: int
    alpha: float | None
    accuracy: list[float]
    class_incremental_accuracy: list[float]


@dataclass
class RunRecord:
    """All that a run produced.

    Attributes:
        accuracy: [T, T], percent; [t, i] is task i after task t, NaN where i > t.
        class_incremental_accuracy: likewise, the argmax over all heads so far.
        alpha: for each task, the merging coefficient; None where nothing was merged.
        epochs: for each task, the epochs trained.
        ranks: for each task, every protected layer's (rank, width) after it.
        paths: for each task, the traced merging path.
        seconds: by phase.
    """

    accuracy: NDArray[np.float64]
    class_incremental_accuracy: NDArray[np.float64]
    alpha: list[float | None] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    ranks: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    paths: list[list[PathPoint]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
