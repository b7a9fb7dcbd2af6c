"""Figures of merging: alpha of each task, and the path of each merge. BECAME (arXiv 2504.02666), section 4.

Convention: alpha 0 is the end of stage 1 (theta_gp), 1 the end of stage 2 (theta_hat); losses are sums over tasks of
mean training losses, accuracies means over tasks so far in percent.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adapters.analysis.drawing import INK, MUTED, PAPER, legend, new_figure, number_tasks, styled
from adapters.analysis.groups import Results, groups_of
from adapters.runs import RunResult
from became_core import BecameError

__all__ = ["merged_tasks", "plot_alpha", "plot_path", "predicted_loss"]


def merged_tasks(result: RunResult) -> list[int]:
    """Return the numbers, from 1, of the tasks at whose end there was a merge."""
    return [task for task, alpha in enumerate(result.alpha, start=1) if alpha is not None]


def predicted_loss(path: Mapping[str, Any], alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what the default estimator says of the loss along a path, from the true loss at its first point.

    The new task's side is its secant, the old tasks' their diagonal, calibrated by the new task's exact curvature.
    """
    new, old = path["new"], path["old"]
    kappa = new["exact"][1] / new["diagonal"][1] if new["diagonal"][1] > 0 else 1.0
    slope, curvature = (new["secant"][part] + kappa * old["diagonal"][part] for part in (0, 1))
    start = path["points"][0]

    def quadratic(alpha: NDArray[np.float64] | float) -> Any:
        return slope * alpha + 0.5 * curvature * alpha**2

    return np.asarray(start["loss"] + quadratic(alphas) - quadratic(start["alpha"]))


@styled
def plot_alpha(results: Results) -> Figure:
    """Return the merging coefficient of each task: a line a method, the seeds around it as open marks.

    Raises:
        BecameError: if nothing was merged.
    """
    groups = [group for group in groups_of(results) if any(merged_tasks(run) for run in group.runs)]
    if not groups:
        raise BecameError("no run has merged anything; give a run of a method that merges, such as became.")
    figure, panels = new_figure(2.2 + 0.16 * len(groups), grid="y")
    axes = panels[0, 0]
    for group in groups:
        values = np.array([run.alpha for run in group.runs], dtype=float)
        there = np.isfinite(values).all(axis=0)
        # Beside one another, so that equal values can be told apart.
        tasks = np.flatnonzero(there) + 1 + 0.06 * (groups.index(group) - (len(groups) - 1) / 2)
        axes.plot(tasks, values[:, there].mean(axis=0), **group.line, label=group.name)
        if len(values) > 1:
            look: dict[str, Any] = {
                "marker": group.line["marker"],
                "linestyle": "none",
                "markersize": 3.5,
                "markerfacecolor": PAPER,
            }
            axes.plot(tasks, values[:, there].T, **look, markeredgecolor=group.colour)
    number_tasks(axes, len(groups[0].runs[0].alpha), "task")
    axes.set_ylim(-0.04, 1.04)
    axes.set_ylabel("α (0: stage 1, 1: stage 2)")
    legend(figure, axes)
    return figure


@styled
def plot_path(results: Results) -> Figure:
    """Return, for each merge of a run, the truth along its path beside what the default estimator predicts.

    Args:
        results: one run; of several, the first that has paths is shown.

    Raises:
        BecameError: if no path was traced.
    """
    found = [(group, run) for group in groups_of(results) for run in group.runs if run.paths]
    if not found:
        raise BecameError("no merging path was traced; run with --path-points 11.")
    group, run = found[0]
    figure, panels = new_figure(0.75 + 1.55 * len(run.paths), len(run.paths), 2, grid="y", sharex=True)
    for task, path, row in zip(merged_tasks(run), run.paths, panels, strict=True):
        alpha = run.alpha[task - 1]
        assert alpha is not None
        _draw_truth(row[0], path, "loss", group.colour)
        _draw_truth(row[1], path, "accuracy", group.colour)
        _draw_prediction(row[0], path)
        for axes in row:
            axes.axvline(alpha, color=INK, linewidth=1, linestyle=":", label="α*")
        best = min(path["points"], key=lambda point: point["loss"])
        for axes, what in zip(row, ("loss", "accuracy"), strict=True):
            look: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 8, "markerfacecolor": "none"}
            axes.plot(best["alpha"], best[what], **look, markeredgecolor=INK, label="least loss of the grid")
        row[0].set_title(f"into task {task}, α* = {alpha:.2f}", pad=3)
        row[0].set_ylabel("loss, nats")
        row[1].set_ylabel("accuracy, %")
    for axes in panels[-1]:
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks([0, 0.5, 1], ["0\nstage 1", "α", "1\nstage 2"])
    legend(figure, panels[0, 0])
    return figure


def _draw_truth(axes: Axes, path: Mapping[str, Any], what: str, colour: str) -> None:
    alphas, values = ([point[key] for point in path["points"]] for key in ("alpha", what))
    axes.plot(alphas, values, color=colour, marker="o", markersize=2.5, label="truth")
    ends: dict[str, Any] = {"marker": "s", "linestyle": "none", "markersize": 5, "markerfacecolor": PAPER}
    axes.plot(
        alphas[:: len(alphas) - 1], values[:: len(values) - 1], **ends, markeredgecolor=colour, label="ends of the path"
    )


def _draw_prediction(axes: Axes, path: Mapping[str, Any]) -> None:
    """The parabola, where it is within reach of the truth: it may leave the panel, but not flatten it."""
    losses = [point["loss"] for point in path["points"]]
    reach = (max(losses) - min(losses)) or 1.0
    alphas = np.linspace(path["points"][0]["alpha"], path["points"][-1]["alpha"], 101)
    axes.plot(alphas, predicted_loss(path, alphas), color=MUTED, linestyle="--", label="predicted")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, min(losses) - 0.6 * reach), min(high, max(losses) + 0.3 * reach))
