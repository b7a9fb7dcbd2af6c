"""The events that a run reports, and the record of a whole run.

Convention: accuracies are in percent, losses in the natural unit of the likelihood. Row t of a matrix is the state
after task t, with NaN for tasks not yet learned. All scores are of a matrix in which up is good: the accuracies where
there are labels, and the losses with their signs turned where there are none. ``Measure`` is the only place where a
sign is turned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from became_core.continual.metrics import Measure

__all__ = ["EpochEnd", "MergePath", "PathPoint", "RunRecord", "TaskEnd"]


@dataclass(frozen=True)
class EpochEnd:
    """What is known when an epoch ends.

    Attributes:
        task: the number of the task, from 0.
        stage: 1 or 2.
        epoch: how many epochs of the stage are done.
        epochs: how many epochs the stage has, at most.
        loss: the mean training loss of the epoch.
        rate: the learning rate of its last step.
        validation_loss: the mean validation loss after it; NaN if the schedule needs none.
    """

    task: int
    stage: int
    epoch: int
    epochs: int
    loss: float
    rate: float
    validation_loss: float


@dataclass(frozen=True)
class PathPoint:
    """The true loss and accuracy at one alpha of a merging path.

    Attributes:
        alpha: the coefficient of theta_hat.
        loss: the sum over all tasks so far of the mean loss on the samples that curvature is measured on, which are not
            all training samples if ``Training.curvature_samples`` or ``measured_on`` says so; at the calibrated softmax
            if the method's ``temper`` is "calibrated".
        accuracy: the mean over all tasks so far of the task-incremental test accuracy, in percent.
    """

    alpha: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class MergePath:
    """A report of a merging path: the true losses along it, and the losses of both sides by each way to measure them.

    Attributes:
        points: the true loss and accuracy at each traced alpha.
        new: the slope at theta_gp and the curvature of the new task's loss along delta, by the way of measuring.
        old: the slope at theta_gp and the curvature of all old tasks' loss along delta, by the way of measuring.
        curve: the true loss and accuracy at the same places of the curve through the mode of both sides' diagonals;
            empty if the old side's is calibrated across tasks, or an earlier version traced the path.
        predicted_advantage: by how much the loss of these diagonals is lower at the mode than anywhere on the segment;
            NaN if there is no curve.
    """

    points: list[PathPoint]
    new: dict[str, tuple[float, float]]
    old: dict[str, tuple[float, float]]
    curve: list[PathPoint] = field(default_factory=list, metadata={"later": True})
    predicted_advantage: float = field(default=float("nan"), metadata={"later": True})


@dataclass(frozen=True)
class TaskEnd:
    """What is known when a task has been learned.

    Attributes:
        task: the number of the task, from 0.
        alpha: the merging coefficient; None if nothing was merged.
        accuracy: the task-incremental accuracy on each task so far.
        class_incremental_accuracy: the class-incremental accuracy on each task so far.
        full: the protected spaces that became whole with this task: such a weight no longer changes in stage 1.
        loss: the loss on each task so far, in its natural unit.
        samples: what the network writes or draws in the manner of each task so far, as ``Learner.written`` returns it;
            empty if it does neither.
        correlation: the correlation of predictions with the targets of each task so far; empty unless outputs predict
            numbers.
        temperature: what the task's curvature was multiplied by: its kappa (``calibration``), its temperature
            (``tempering``), or both; None if it was by neither.
    """

    task: int
    alpha: float | None
    accuracy: list[float]
    class_incremental_accuracy: list[float]
    full: frozenset[str] = frozenset()
    loss: list[float] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    correlation: list[float] = field(default_factory=list)
    temperature: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """The results of a run so far.

    Attributes:
        accuracy: the task-incremental accuracy [T, T]; [t, i] is that on task i after task t, NaN for i > t.
        class_incremental_accuracy: the class-incremental accuracy [T, T]; [t, i] is that on task i after task t, NaN
            for i > t.
        alpha: for each task, the merging coefficient; None if nothing was merged.
        curves: for each task, its epochs, with those of stage 1 before those of stage 2.
        ranks: for each task, the (rank, width) of every protected space after it.
        memory: for each task, the bytes that the method stores after it, without the network.
        paths: for each merge, the report of its path, if paths are traced.
        seconds: the wall-clock time by phase, and in total; if a run was interrupted, the sum over its parts.
        loss: the loss [T, T], in its natural unit; [t, i] is that on task i after task t, NaN for i > t. It is empty if
            an earlier version began the run.
        unit: the unit in which the run is measured: "%" for accuracy, or that of the loss.
        samples: after each task, what the network writes or draws in the manner of each task so far; empty if it does
            neither.
        correlation: the correlation of predictions with targets [T, T]; [t, i] is that on task i after task t, NaN for
            i > t, where the targets are constant, and for tasks that an earlier version learned. It is empty unless
            outputs predict numbers.
        temperatures: for each task, what its curvature was multiplied by, as ``TaskEnd`` says, that of the first task
            before the first merge; empty if nothing was. What an earlier version did not record is left out.
    """

    accuracy: NDArray[np.float64]
    class_incremental_accuracy: NDArray[np.float64]
    alpha: list[float | None] = field(default_factory=list)
    curves: list[tuple[EpochEnd, ...]] = field(default_factory=list)
    ranks: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    paths: list[MergePath] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    loss: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)), metadata={"later": True})
    unit: str = field(default="%", metadata={"later": True})
    samples: list[list[str]] = field(default_factory=list, metadata={"later": True})
    correlation: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)), metadata={"later": True})
    temperatures: list[float] = field(default_factory=list, metadata={"later": True})

    @property
    def measured(self) -> NDArray[np.float64]:
        """The matrix of which scores are computed, in which up is good: the accuracy, or the loss with its sign turned.

        Examples:
            >>> RunRecord(np.zeros((1, 1)), np.zeros((1, 1)), loss=np.array([[2.0]]), unit="RMSE").measured
            array([[-2.]])
        """
        return Measure(self.unit).matrix(self.accuracy, self.loss)

    @property
    def epochs(self) -> list[int]:
        """For each task, the number of epochs that it was trained for."""
        return [len(curve) for curve in self.curves]

    @classmethod
    def empty(cls, tasks: int, unit: str = "%") -> Self:
        """Return the record of a run of ``tasks`` tasks before the first task.

        Args:
            tasks: how many there are.
            unit: the unit in which the run is measured.
        """
        accuracy, by_argmax, loss = (np.full((tasks, tasks), np.nan) for _ in range(3))
        return cls(accuracy, by_argmax, loss=loss, unit=unit)

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
            loss=_with_row(self.loss, end.task, end.loss) if len(self.loss) else self.loss,
            samples=[*self.samples, end.samples] if end.samples else self.samples,
            correlation=self._correlation_with(end) if end.correlation else self.correlation,
            temperatures=self.temperatures if end.temperature is None else [*self.temperatures, end.temperature],
            alpha=[*self.alpha, end.alpha],
            curves=[*self.curves, curve],
            ranks=[*self.ranks, ranks],
            memory=[*self.memory, memory],
            paths=self.paths if path is None else [*self.paths, path],
        )

    def _correlation_with(self, end: TaskEnd) -> NDArray[np.float64]:
        matrix = self.correlation if len(self.correlation) else np.full_like(self.accuracy, np.nan)
        return _with_row(matrix, end.task, end.correlation)


def _with_row(matrix: NDArray[np.float64], row: int, values: Sequence[float]) -> NDArray[np.float64]:
    result = matrix.copy()
    result[row, : len(values)] = values
    return result
