"""The path report of a run: the truth along every merging path, beside the alpha of each estimator.

Convention: losses are sums over tasks of mean training losses; accuracies are means over tasks, in percent. What an
estimator's alpha would have given is read off the traced points, straight between them; its regret is how far that is
from the best traced point.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from adapters.runs import RunResult
from became_core.continual import Along, alpha_estimates

__all__ = ["estimated_alphas", "estimator_table", "path_table", "regret"]


def path_table(result: RunResult) -> Table:
    """Return, for every merge of a run, loss and accuracy at each traced alpha."""
    table = Table(title=f"{result.method}-seed{result.seed}: the truth along the merging paths", title_justify="left")
    table.add_column("into task", justify="right")
    table.add_column("")
    for point in result.paths[0]["points"]:
        table.add_column(f"α={point['alpha']:.2g}", justify="right")
    for task, path in zip(_merged_tasks(result), result.paths, strict=True):
        points = path["points"]
        table.add_row(str(task), "loss", *(f"{point['loss']:.3f}" for point in points))
        table.add_row("", "accuracy", *(f"{point['accuracy']:.2f}" for point in points), end_section=True)
    return table


def estimator_table(result: RunResult) -> Table:
    """Return, for every estimator, its alpha at each merge and its mean regrets, the least in accuracy first."""
    table = Table(title=f"{result.method}-seed{result.seed}: what estimators make of them", title_justify="left")
    table.add_column("estimator (new side / old side)")
    for task in _merged_tasks(result):
        table.add_column(f"α into {task}", justify="right")
    table.add_column("regret, points", justify="right")
    table.add_column("in loss", justify="right")
    alphas = estimated_alphas(result.paths)
    points = {name: regret(result.paths, each, "accuracy") for name, each in alphas.items()}
    for name in sorted(alphas, key=lambda each: points[each]):
        losses = regret(result.paths, alphas[name], "loss")
        table.add_row(name, *(f"{alpha:.2f}" for alpha in alphas[name]), f"{points[name]:.2f}", f"{losses:.3f}")
    return table


def estimated_alphas(paths: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return each estimator's alpha at each merge; the best of the grid by loss among them."""
    estimates = [alpha_estimates(*(_sides(path[side]) for side in ("new", "old"))) for path in paths]
    found = {name: [each[name] for each in estimates] for name in estimates[0]}
    return found | {"grid, by loss": [min(path["points"], key=lambda at: at["loss"])["alpha"] for path in paths]}


def regret(paths: Sequence[Mapping[str, Any]], alphas: Sequence[float], what: str) -> float:
    """Return the mean over merges of how far these alphas are from the best traced point, in accuracy or loss."""
    found = []
    for path, alpha in zip(paths, alphas, strict=True):
        grid, truth = (np.array([point[key] for point in path["points"]]) for key in ("alpha", what))
        there = np.interp(alpha, grid, truth)
        found.append(truth.max() - there if what == "accuracy" else there - truth.min())
    return float(np.mean(found))


def _sides(sides: Mapping[str, Sequence[float]]) -> dict[str, Along]:
    return {name: Along(*side) for name, side in sides.items()}


def _merged_tasks(result: RunResult) -> list[int]:
    """The numbers of the tasks at whose end there was a merge."""
    return [task for task, alpha in enumerate(result.alpha, start=1) if alpha is not None]
