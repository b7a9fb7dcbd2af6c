"""Whether a file's result is one that can be drawn: every value of the kind that a run writes.

Convention: a result is taken for what it says, but not for how it says it; a file may come from anyone.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adapters.runs import RunResult
from adapters.runs.files import DamagedError, read_sealed
from became_core import BecameError

__all__ = ["read_runs"]


def read_runs(outs: Sequence[Path]) -> list[RunResult]:
    """Return the finished runs of these folders, in the order of their names.

    Raises:
        BecameError: if a folder has none, or a file is damaged.
    """
    found = []
    for out in outs:
        files = sorted(out.glob("*/results.json"))
        if not files:
            raise BecameError(f"{printed(out)} holds no finished runs; give a folder that --out named.")
        found += [_read(file) for file in files]
    return found


def printed(path: Path) -> str:
    """Return a path as a message can show it."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


def _read(file: Path) -> RunResult:
    try:
        result = RunResult.from_json(read_sealed(file))
        _check(result)
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise BecameError(f"{printed(file)} is damaged or no run's results; move it away.") from None
    return result


def _check(result: RunResult) -> None:
    """Raise a ValueError, KeyError or TypeError unless every value is as a run writes it."""
    tasks = len(result.accuracy)
    _require(all(type(text) is str for text in (result.backend, result.benchmark, result.method)))
    _require(type(result.seed) is int and type(result.config) is dict and tasks > 0)
    for matrix in (result.accuracy, result.class_incremental_accuracy):
        _require(matrix.shape == (tasks, tasks))
        learned = [matrix[task, : task + 1] for task in range(tasks)]
        _require(all(0 <= value <= 100 for row in learned for value in row))
    _require(len(result.alpha) == len(result.epochs) == tasks and len(result.ranks) <= tasks)
    _numbers(alpha for alpha in result.alpha if alpha is not None)
    _numbers(result.epochs)
    _numbers(result.seconds.values())
    _require(result.seconds["total"] >= 0)
    for ranks in result.ranks:
        for rank, width in ranks.values():
            _numbers((rank, width))
            _require(0 <= rank <= width and width > 0)
    merges = sum(alpha is not None for alpha in result.alpha)
    _require(len(result.paths) in (0, merges))
    for path in result.paths:
        _check_path(path)
    _require(len(result.curves) in (0, tasks))
    for curve, epochs in zip(result.curves, result.epochs, strict=False):
        _require(len(curve) == epochs)
        _numbers(epoch["loss"] for epoch in curve)
        _numbers(epoch["validation_loss"] for epoch in curve if not math.isnan(epoch["validation_loss"]))
        _require(all(epoch["stage"] in (1, 2) for epoch in curve))


def _check_path(path: dict[str, Any]) -> None:
    _require(len(path["points"]) >= 2)
    for point in path["points"]:
        _numbers(point[name] for name in ("alpha", "loss", "accuracy"))
    alphas = [point["alpha"] for point in path["points"]]
    _require(all(0 <= alpha <= 1 for alpha in alphas) and sorted(set(alphas)) == alphas)
    for side, names in (("new", ("secant", "exact", "diagonal")), ("old", ("diagonal",))):
        for name in names:
            slope, curvature = path[side][name]
            _numbers((slope, curvature))


def _numbers(values: Iterable[Any]) -> None:
    _require(all(type(value) in (int, float) and math.isfinite(value) for value in values))


def _require(true: bool) -> None:
    if not true:
        raise ValueError
