"""A run's result as plain values, and its JSON form.

Convention: accuracies in percent; ``null`` in a matrix stands for what was not measured (a task not yet learned).
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from became_core.continual import EpochEnd, RunRecord
from became_core.continual.metrics import average_accuracy, backward_transfer, forgetting, plasticity

__all__ = ["RunResult", "Scores"]


@dataclass(frozen=True)
class Scores:
    """The metrics of one accuracy matrix."""

    acc: float
    bwt: float
    forgetting: float
    plasticity: float

    @classmethod
    def of(cls, accuracy: NDArray[np.float64]) -> Self:
        """Return the metrics of an accuracy matrix [T, T]."""
        return cls(
            acc=average_accuracy(accuracy),
            bwt=backward_transfer(accuracy),
            forgetting=forgetting(accuracy),
            plasticity=plasticity(accuracy),
        )


@dataclass(frozen=True)
class RunResult:
    """One finished run: what ``results.json`` holds."""

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

    @classmethod
    def of(
        cls, record: RunRecord, *, backend: str, benchmark: str, method: str, seed: int, config: dict[str, Any]
    ) -> Self:
        """Return the result of a record."""
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
        )

    @property
    def scores(self) -> Scores:
        """The task-incremental metrics."""
        return Scores.of(self.accuracy)

    @property
    def class_incremental_scores(self) -> Scores:
        """The class-incremental metrics."""
        return Scores.of(self.class_incremental_accuracy)

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
            "class_incremental": asdict(self.class_incremental_scores),
            "alpha": self.alpha,
            "epochs": self.epochs,
            "ranks": self.ranks,
            "memory": self.memory,
            "paths": _without(math.nan, self.paths),
            "curves": _without(math.nan, self.curves),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the result that ``to_json`` gave; one of before memory and curves were recorded has none.

        Raises:
            KeyError: if a value is missing.
        """
        later = "memory", "curves"
        fields = {name: values[name] for name in cls.__dataclass_fields__ if name in values or name not in later}
        for name in ("accuracy", "class_incremental_accuracy"):
            fields[name] = np.array(fields[name], dtype=float)  # null becomes NaN
        for name in ("paths", "curves"):
            fields[name] = _without(None, fields.get(name, []))
        return cls(**fields)


def _epoch(event: EpochEnd) -> dict[str, Any]:
    return {"stage": event.stage, "loss": event.loss, "rate": event.rate, "validation_loss": event.validation_loss}


def _without(absent: float | None, value: Any) -> Any:
    """Nested plain values with null for what is no finite number, if NaN is to be absent; or with NaN for null."""
    if isinstance(value, dict):
        return {name: _without(absent, each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without(absent, each) for each in value]
    if absent is None:
        return math.nan if value is None else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]
