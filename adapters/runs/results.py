"""A run's result as plain values, and its JSON form.

Convention: accuracies in percent; ``null`` in a matrix stands for what was not measured (a task not yet learned). A
file of results may come from anyone, so ``from_json`` checks that every value is one that a run could have written.
"""

import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from became_core.continual import EpochEnd, RunRecord, Segments
from became_core.continual.metrics import Measure, average_accuracy, backward_transfer, forgetting, plasticity

__all__ = ["RunResult", "Scores"]


@dataclass(frozen=True)
class Scores:
    """The metrics of one matrix in which up is good, as ``RunRecord.measured`` is."""

    acc: float
    bwt: float
    forgetting: float
    plasticity: float

    @classmethod
    def of(cls, accuracy: NDArray[np.float64]) -> Self:
        """Return the metrics of a matrix [T, T]; all are NaN if the matrix is."""
        if np.isnan(accuracy).all():
            return cls(math.nan, math.nan, math.nan, math.nan)
        return cls(
            acc=average_accuracy(accuracy),
            bwt=backward_transfer(accuracy),
            forgetting=forgetting(accuracy),
            plasticity=plasticity(accuracy),
        )


@dataclass(frozen=True)
class RunResult:
    """One finished run: what ``results.json`` holds.

    Where boundaries are unknown, ``boundaries`` has what a detector found: ``segments``, the true ``changes``, how many
    samples each learned segment is ``tested`` on, the ``delays`` (null for a change that was missed) and the
    ``false_alarms``. Places and delays are numbers of batches. A row of the matrices is a segment that was learned.
    """

    backend: str
    benchmark: str
    method: str
    seed: int
    config: dict[str, Any]
    accuracy: NDArray[np.float64]
    class_incremental_accuracy: NDArray[np.float64]
    alpha: list[float | None]
    epochs: list[int]
    ranks: list[dict[str, Any]]
    paths: list[dict[str, Any]]
    seconds: dict[str, float]
    memory: list[int] = field(default_factory=list)
    curves: list[list[dict[str, Any]]] = field(default_factory=list)
    data_dir: str | None = None
    loss: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    unit: str = "%"
    samples: list[list[str]] = field(default_factory=list)
    boundaries: dict[str, Any] | None = None
    correlation: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    temperatures: list[float] = field(default_factory=list)
    data: str | None = None

    @classmethod
    def of(
        cls,
        record: RunRecord,
        *,
        backend: str,
        benchmark: str,
        method: str,
        seed: int,
        config: dict[str, Any],
        data_dir: str | None = None,
        data: str | None = None,
        segments: Segments | None = None,
    ) -> Self:
        """Return the result of a record.

        Args:
            record: of the run.
            backend: those that worked on it.
            benchmark: its name.
            method: its name.
            seed: of the run.
            config: of the run, as plain values.
            data_dir: the folder of the data, if one was given.
            data: the digest of the data, as ``fingerprint`` gives it.
            segments: what was found in the stream, if boundaries were unknown.
        """
        return cls(
            backend=backend,
            benchmark=benchmark,
            method=method,
            seed=seed,
            config=config,
            accuracy=record.accuracy,
            class_incremental_accuracy=record.class_incremental_accuracy,
            alpha=record.alpha,
            epochs=record.epochs,
            ranks=[{name: list(rank) for name, rank in ranks.items()} for ranks in record.ranks],
            paths=[asdict(path) for path in record.paths],
            seconds=record.seconds,
            memory=record.memory,
            curves=[[_epoch(event) for event in curve] for curve in record.curves],
            data_dir=data_dir,
            loss=record.loss,
            unit=record.unit,
            samples=record.samples,
            boundaries=None if segments is None else _boundaries(segments),
            correlation=record.correlation,
            temperatures=record.temperatures,
            data=data,
        )

    @property
    def scores(self) -> Scores:
        """The task-incremental metrics, of the accuracy or of the loss with its sign turned: up is good."""
        return Scores.of(self.measured)

    @property
    def measured(self) -> NDArray[np.float64]:
        """The matrix that scores are of, as of ``RunRecord``."""
        return self.measure.matrix(self.accuracy, self.loss)

    @property
    def on_test_samples(self) -> bool:
        """Whether models were scored on test samples, and not on held-out training samples."""
        return bool(self.config.get("score_on", "test") == "test")

    @property
    def measure(self) -> Measure:
        """What the run is measured by: accuracy or a loss."""
        return Measure(self.unit)

    @property
    def class_incremental_scores(self) -> Scores:
        """The class-incremental metrics."""
        return Scores.of(self.class_incremental_accuracy)

    @property
    def mean_loss(self) -> float | None:
        """The mean over all tasks, after the last, of the loss in its natural unit; None if none was recorded."""
        return average_accuracy(self.loss) if len(self.loss) else None

    @property
    def mean_correlation(self) -> float | None:
        """The mean over all tasks, after the last, of predictions' correlation with targets; None if it has none."""
        mean = float(np.mean(self.correlation[-1])) if len(self.correlation) else math.nan
        return None if math.isnan(mean) else mean

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, the metrics among them."""
        return {
            "backend": self.backend,
            "benchmark": self.benchmark,
            "method": self.method,
            "seed": self.seed,
            "config": self.config,
            "accuracy": _rows(self.accuracy),
            "class_incremental_accuracy": _rows(self.class_incremental_accuracy),
            **asdict(self.scores),
            "class_incremental": _without(math.nan, asdict(self.class_incremental_scores)),
            "alpha": self.alpha,
            "epochs": self.epochs,
            "ranks": self.ranks,
            "memory": self.memory,
            "paths": _without(math.nan, self.paths),
            "curves": _without(math.nan, self.curves),
            "seconds": self.seconds,
            "data_dir": self.data_dir,
            "loss": _rows(self.loss),
            "unit": self.unit,
            "samples": self.samples,
            "boundaries": self.boundaries,
            "correlation": _rows(self.correlation),
            "temperatures": self.temperatures,
            "data": self.data,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the result that ``to_json`` gave; earlier versions recorded less.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError: if a value is missing or is none
                that a run could have written.
        """
        # What has no default was always recorded.
        required = {it.name for it in dataclass_fields(cls) if it.default is it.default_factory is MISSING}
        fields = {name: values[name] for name in cls.__dataclass_fields__ if name in values or name in required}
        for name in ("accuracy", "class_incremental_accuracy"):
            fields[name] = np.array(fields[name], dtype=float)  # null becomes NaN
        for name in ("loss", "correlation"):
            fields[name] = np.array(fields[name], dtype=float) if fields.get(name) else np.zeros((0, 0))
        for name in ("paths", "curves"):
            fields[name] = _without(None, fields.get(name, []))
        result = cls(**fields)
        result._check()
        return result

    def _check(self) -> None:
        tasks = len(self.accuracy)
        _require(all(type(text) is str for text in (self.backend, self.benchmark, self.method)))
        _require(all(text is None or type(text) is str for text in (self.data_dir, self.data)))
        _require(type(self.unit) is str)
        _require(len(self.samples) in (0, tasks) and all(type(text) is str for texts in self.samples for text in texts))
        _require(self.boundaries is None or len(self.boundaries["tested"]) == tasks)
        _require(type(self.seed) is int and type(self.config) is dict and tasks > 0)
        for matrix in (self.accuracy, self.class_incremental_accuracy):
            _require(matrix.shape == (tasks, tasks))
            in_range = all(0 <= value <= 100 for task in range(tasks) for value in matrix[task, : task + 1])
            _require(in_range or (not self.measure.is_accuracy and bool(np.isnan(matrix).all())))
        if not self.measure.is_accuracy or len(self.loss):
            _require(self.loss.shape == (tasks, tasks))
            _require_numbers(value for task in range(tasks) for value in self.loss[task, : task + 1].tolist())
        _require(self.correlation.shape in ((0, 0), (tasks, tasks)))
        _require(bool(np.all(np.isnan(self.correlation) | (abs(self.correlation) <= 1))))
        _require(len(self.alpha) == len(self.epochs) == tasks and len(self.ranks) <= tasks)
        _require_numbers(alpha for alpha in self.alpha if alpha is not None)
        _require_numbers(self.epochs)
        _require(len(self.temperatures) <= tasks)  # an earlier version that began the run recorded fewer
        _require_numbers(self.temperatures)
        _require_numbers(self.seconds.values())
        _require(self.seconds["total"] >= 0)
        for ranks in self.ranks:
            for rank, width in ranks.values():
                _require_numbers((rank, width))
                _require(0 <= rank <= width and width > 0)
        # A merge by single weights has a path, and no alpha.
        merges = sum(alpha is not None for alpha in self.alpha)
        _require(not self.paths or max(merges, 1) <= len(self.paths) < tasks)
        for path in self.paths:
            _check_path(path)
        _require(len(self.curves) in (0, tasks))
        for curve, epochs in zip(self.curves, self.epochs, strict=False):
            _require(len(curve) == epochs)
            _require_numbers(epoch["loss"] for epoch in curve)
            _require_numbers(epoch["validation_loss"] for epoch in curve if not math.isnan(epoch["validation_loss"]))
            _require(all(epoch["stage"] in (1, 2) for epoch in curve))


def _boundaries(found: Segments) -> dict[str, Any]:
    return {
        "segments": [asdict(segment) for segment in found.segments],
        "changes": list(found.changes),
        "tested": [len(task.test) for task in found.stream.tasks],
        "delays": found.delays,
        "false_alarms": found.false_alarms,
    }


def _check_path(path: dict[str, Any]) -> None:
    _require(len(path["points"]) >= 2)
    for point in path["points"]:
        _require_numbers(point[name] for name in ("alpha", "loss", "accuracy"))
    alphas = [point["alpha"] for point in path["points"]]
    _require(all(0 <= alpha <= 1 for alpha in alphas) and sorted(set(alphas)) == alphas)
    for side, names in (("new", {"secant", "exact", "diagonal"}), ("old", {"diagonal"})):
        _require(names <= path[side].keys())
        for slope, curvature in path[side].values():
            _require_numbers((slope, curvature))
    for point in path.get("curve") or ():
        _require_numbers(point[name] for name in ("loss", "accuracy"))


def _require_numbers(values: Iterable[Any]) -> None:
    _require(all(type(value) in (int, float) and math.isfinite(value) for value in values))


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _epoch(event: EpochEnd) -> dict[str, Any]:
    return {"stage": event.stage, "loss": event.loss, "rate": event.rate, "validation_loss": event.validation_loss}


def _without(absent: float | None, value: Any) -> Any:
    """Return nested plain values without one of two: without NaN and infinities, which become null; or without null."""
    if isinstance(value, dict):
        return {name: _without(absent, part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without(absent, part) for part in value]
    if absent is None:
        return math.nan if value is None else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]
