"""Small synthetic runs for the report's tests."""

from dataclasses import replace
from typing import Any

import numpy as np

from adapters.runs import RunResult

CONFIG = {"tasks": 3, "first": 3, "epochs": 2}


def path(best: float = 0.5) -> dict[str, Any]:
    """A traced path whose loss is a parabola with its minimum at ``best``, which the estimators know."""
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    return {
        "points": [{"alpha": a, "loss": 1 + (a - best) ** 2, "accuracy": 70 - 5 * (a - best) ** 2} for a in grid],
        "new": {"secant": [-2 * best - 1, 1.0], "exact": [-1.0, 2.0], "diagonal": [-1.0, 4.0]},
        "old": {"diagonal": [2.0, 2.0]},
    }


def curve() -> list[dict[str, Any]]:
    """Three epochs, the last of stage 2; the first stage has a validation loss."""
    found = [(1, 0.9, 0.95), (1, 0.5, 0.7), (2, 0.4, np.nan)]
    return [{"stage": stage, "loss": loss, "rate": 0.1, "validation_loss": held} for stage, loss, held in found]


def run(method: str = "became", seed: int = 0, tasks: int = 3, **changes: Any) -> RunResult:
    """A run with merges, ranks and paths."""
    accuracy = np.array(
        [[90.0 - row + column if column <= row else np.nan for column in range(tasks)] for row in range(tasks)]
    )
    result = RunResult(
        backend="torch",
        benchmark="split-mnist",
        method=method,
        seed=seed,
        config=CONFIG,
        accuracy=accuracy + seed,
        class_incremental_accuracy=accuracy / 2,
        alpha=[None, *(0.5 + 0.1 * seed for _ in range(tasks - 1))],
        epochs=[3] * tasks,
        ranks=[{"fc1.weight": [2 + task, 2 + tasks], "fc2.weight": [1, 9]} for task in range(tasks)],
        paths=[path() for _ in range(tasks - 1)],
        curves=[curve() for _ in range(tasks)],
        seconds={"stage1": 6.0, "merge": 3.0, "total": 10.0},
    )
    return replace(result, **changes)


def plain(method: str = "finetune", seed: int = 0, tasks: int = 3, **changes: Any) -> RunResult:
    """A run that neither merged nor protected anything, of a version that recorded no epochs."""
    nothing: dict[str, Any] = {"alpha": [None] * tasks, "ranks": [{}] * tasks, "paths": [], "curves": []}
    return run(method, seed, tasks, **nothing | changes)
