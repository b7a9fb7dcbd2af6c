"""Figures of what happened in training: losses by epoch, merging coefficients and paths, protected ranks, time.

The merging of BECAME (arXiv 2504.02666), section 4, is drawn along its path. Convention: losses of epochs are means of
the cross-entropy over samples, in nats: of training, over an epoch, with dropout; of validation, at the epoch's end,
without. Along a path alpha 0 is the end of stage 1 (theta_gp) and alpha 1 the end of stage 2 (theta_hat); losses are
sums over tasks of mean training losses, and accuracies are means over the tasks so far, in percent. A rank counts
protected directions, a width all of them; seconds are means over seeds.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from adapters.analysis.figures.drawing import (
    INK,
    MUTED,
    PAPER,
    figure_text,
    heat_map,
    label_bars,
    legend,
    new_figure,
    number_tasks,
    styled,
)
from adapters.analysis.groups import Group, Results, groups_of, have_spread
from adapters.analysis.path_report import merged_tasks, traced_tasks
from adapters.runs import RunResult
from became_core import BecameError

__all__ = [
    "has_curves",
    "phases",
    "plot_alpha",
    "plot_learning_curves",
    "plot_path",
    "plot_ranks",
    "plot_seconds",
    "predicted_loss",
]

# In the order in which a task goes through them; others come after these.
PHASES = ("stage1", "stage2", "merge", "memory", "evaluation")


def has_curves(run: RunResult) -> bool:
    """Whether the run has a loss of any epoch."""
    return any(run.curves)


@styled
def plot_learning_curves(results: Results) -> Figure:
    """Return training and validation losses by epoch: a line a seed, broken where a stage or a task begins.

    Raises:
        BecameError: if no run has recorded its epochs.
    """
    groups = [group for group in groups_of(results) if any(map(has_curves, group.runs))]
    if not groups:
        raise BecameError("no run has recorded its epochs; early versions did not record them.")
    figure, panels = new_figure(0.5 + 1.5 * len(groups), len(groups), grid="y", sharex=True)
    for axes, group in zip(panels[:, 0], groups, strict=True):
        first = next(run for run in group.runs if has_curves(run))
        starts = np.cumsum([0, *(len(curve) for curve in first.curves)])
        for start in starts[1:-1]:
            axes.axvline(start + 0.5, color=MUTED, linewidth=0.6)
        labelled: set[str] = set()
        for run in filter(has_curves, group.runs):
            for epochs, stage, losses, validation_losses in _stretches(run):
                for name, values, style in (
                    (f"stage {stage}", losses, "-" if stage == 1 else "--"),
                    ("validation", validation_losses, ":"),
                ):
                    if not np.isfinite(values).any():
                        continue
                    look = {"color": MUTED if name == "validation" else group.colour, "linestyle": style}
                    axes.plot(epochs, values, **look, marker=".", label=None if name in labelled else name)
                    labelled.add(name)
        axes.set_ylabel("loss, nats")
        if len(groups) > 1:
            axes.set_title(figure_text(group.label))
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    panels[-1, 0].set_xlabel("epoch; at a vertical line a task begins")
    legend(figure, max(panels[:, 0], key=lambda axes: len(axes.get_legend_handles_labels()[0])))
    return figure


def _stretches(run: RunResult) -> list[tuple[list[int], int, list[float], list[float]]]:
    """Return, for each stage of each task: the numbers of its epochs in the run, the stage, both kinds of losses."""
    stretches: list[tuple[list[int], int, list[float], list[float]]] = []
    epoch = 0
    for curve in run.curves:
        for position, record in enumerate(curve):
            epoch += 1
            if position == 0 or record["stage"] != stretches[-1][1]:
                stretches.append(([], record["stage"], [], []))
            epochs, _, losses, validation_losses = stretches[-1]
            epochs.append(epoch)
            losses.append(record["loss"])
            validation_losses.append(record["validation_loss"])
    return stretches


def predicted_loss(path: Mapping[str, Any], alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the loss along a path that the default estimator predicts from the true loss at the path's first point.

    The new task is described by its secant, the old tasks by their diagonal curvature, which is calibrated by the new
    task's exact curvature.
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
        axes.plot(tasks, values[:, there].mean(axis=0), **group.line, label=figure_text(group.label))
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
    traced = [(group, run) for group in groups_of(results) for run in group.runs if run.paths]
    if not traced:
        raise BecameError("no merging path was traced; run with --path-points 11.")
    group, run = traced[0]
    figure, panels = new_figure(0.75 + 1.55 * len(run.paths), len(run.paths), 2, grid="y", sharex=True)
    for task, path, row in zip(traced_tasks(run), run.paths, panels, strict=True):
        alpha = run.alpha[task - 1]
        _draw_truth(row[0], path, "loss", group.colour)
        _draw_truth(row[1], path, "accuracy", group.colour)
        _draw_prediction(row[0], path)
        for axes in row if alpha is not None else ():
            axes.axvline(alpha, color=INK, linewidth=1, linestyle=":", label="α*")
        best = min(path["points"], key=lambda point: point["loss"])
        for axes, what in zip(row, ("loss", "accuracy"), strict=True):
            look: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 8, "markerfacecolor": "none"}
            axes.plot(best["alpha"], best[what], **look, markeredgecolor=INK, label="least loss of the grid")
        row[0].set_title(f"into task {task}" + ("" if alpha is None else f", α* = {alpha:.2f}"), pad=3)
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
    axes.plot(alphas, predicted_loss(path, alphas), color=MUTED, linestyle="--", label="predicted parabola")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, min(losses) - 0.6 * reach), min(high, max(losses) + 0.3 * reach))


@styled
def plot_ranks(results: Results) -> Figure:
    """Return, for each method, every layer's projector rank after each task; colours are its share of the width.

    Raises:
        BecameError: if no run has protected anything.
    """
    groups = [group for group in groups_of(results) if any(group.runs[0].ranks)]
    if not groups:
        raise BecameError("no run has protected anything; give a run of a method that projects, such as gpm.")
    layers = {
        group.label: list(dict.fromkeys(name for ranks in group.runs[0].ranks for name in ranks)) for group in groups
    }
    heights = [0.85 + 0.27 * len(layers[group.label]) for group in groups]
    figure, panels = new_figure(sum(heights), len(groups), height_ratios=heights)
    for group, axes in zip(groups, panels[:, 0], strict=True):
        names = layers[group.label]
        pairs = [
            [[after.get(name, (math.nan, math.nan)) for after in run.ranks] for name in names] for run in group.runs
        ]
        ranks, widths = np.moveaxis(np.array(pairs), -1, 0)
        mean, width = ranks.mean(axis=0), widths[0]
        heat_map(axes, 100 * mean / width, [[f"{rank:.0f}" for rank in row] for row in mean], (0, 100), "% of width")
        labels = [f"{figure_text(name, 22)} / {np.nanmax(row):.0f}" for name, row in zip(names, width, strict=True)]
        axes.set_yticks(range(1, len(names) + 1), labels)
        axes.set_xlabel("after task")
        axes.set_ylabel("layer / width")
        axes.set_title(f"{figure_text(group.label)}: rank; lighter: nearer the width")
    return figure


@styled
def plot_seconds(results: Results) -> Figure:
    """Return the time that each method spent in each phase, and in all; one scale for all phases."""
    groups = groups_of(results)
    spent = {group.label: phases(group) for group in groups}
    found = dict.fromkeys(name for each in spent.values() for name in each if name != "total")
    names = [*(name for name in PHASES if name in found), *(name for name in found if name not in PHASES), "total"]
    longest = max(each["total"] for each in spent.values())
    unit, divisor = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 600 else ("seconds", 1)
    rows = math.ceil(len(names) / 2)
    figure, panels = new_figure(rows * (0.35 + 0.2 * len(groups)) + 0.35, rows, 2, grid="x", sharex=True, sharey=True)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for name, axes in zip(names, panels.flat, strict=False):
        values = [spent[group.label].get(name, 0.0) / divisor for group in groups]
        axes.barh(range(len(groups)), values, 0.62, color=[group.colour for group in groups])
        title = {"stage1": "stage 1", "stage2": "stage 2"}.get(name, name)
        axes.set_title(figure_text(title, 24), pad=3)
        axes.set_yticks(range(len(groups)), [figure_text(group.label, 20) for group in groups])
        axes.tick_params(axis="y", length=0)
        label_bars(axes, values, [_amount(value) for value in values], values)
    axes = panels[0, 0]
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.22 * longest / divisor)
    figure.supxlabel(unit + (", mean over seeds" if have_spread(groups) else ""), fontsize=8.5)
    return figure


def phases(group: Group) -> dict[str, float]:
    """Return the mean seconds of each phase by name; ``other`` is what the phases leave of ``total``, the last."""
    names = dict.fromkeys(name for run in group.runs for name in run.seconds if name != "total")
    seconds = {name: float(np.mean([run.seconds.get(name, 0.0) for run in group.runs])) for name in names}
    total = float(np.mean([run.seconds["total"] for run in group.runs]))
    other = total - sum(seconds.values())
    if other > 0.005 * total:
        seconds["other"] = seconds.get("other", 0.0) + other
    return seconds | {"total": total}


def _amount(value: float) -> str:
    return "–" if not value else "< 0.01" if value < 0.01 else f"{value:.3g}"
