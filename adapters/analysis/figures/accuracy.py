"""Figures of accuracy: the matrix, each task over time, plasticity and forgetting, and scores beside published ones.

Convention: percent, task-incremental; row t of a matrix is the state after task t. Several seeds give their mean, and
their standard deviation where there is room for it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
from adapters.analysis.groups import Group, Results, groups_of
from adapters.analysis.tables import printable
from adapters.runs.published import PublishedScores, PublishedTable

__all__ = [
    "accuracy_limits",
    "bar_base",
    "plot_accuracy_matrix",
    "plot_accuracy_over_time",
    "plot_plasticity",
    "plot_scores",
    "published_names",
]

_MARKS = ("D", "^", "v", "s", "P")


def accuracy_limits(results: Results) -> tuple[float, float]:
    """Return the least and the greatest accuracy of these runs, outwards to whole tens; losses as they are."""
    groups = groups_of(results)
    values = np.concatenate([run.measured.ravel() for group in groups for run in group.runs])
    values = values[np.isfinite(values)]
    if not groups[0].measure.is_accuracy:
        low, high = float(values.min()), float(values.max())
        return low, high if high > low else low + 1
    return 10 * math.floor(values.min() / 10), 10 * math.ceil(values.max() / 10)


@styled
def plot_accuracy_matrix(results: Results, *, limits: tuple[float, float] | None = None) -> Figure:
    """Return the accuracy matrix of each method as a heat map, the mean over seeds.

    Args:
        results: runs of one method or several.
        limits: the accuracies that the colours span; the runs' own if not given.
    """
    groups = groups_of(results)
    limits = limits or accuracy_limits(groups)
    tasks = len(groups[0].runs[0].accuracy)
    figure, panels = new_figure(len(groups) * (0.75 + 0.27 * tasks), len(groups))
    for group, axes in zip(groups, panels[:, 0], strict=True):
        mean = np.mean([run.measured for run in group.runs], axis=0)
        measure = group.measure
        texts = [[f"{value:.{measure.digits - 1}f}" for value in row] for row in mean]
        heat_map(axes, mean, texts, limits, measure.name)
        axes.yaxis.set_major_locator(axes.xaxis.get_major_locator())
        axes.set_xlabel("task")
        axes.set_ylabel("after task")
        axes.set_title(f"{figure_text(group.label)}: {measure.name}")
    return figure


@styled
def plot_accuracy_over_time(results: Results) -> Figure:
    """Return the accuracy of each task from its own end on, and first the mean over tasks so far: a line a method."""
    groups = groups_of(results)
    tasks = len(groups[0].runs[0].accuracy)
    rows = math.ceil((tasks + 1) / 2)
    head = 0.3 + 0.18 * math.ceil(len(groups) / 2)
    figure, panels = new_figure(head + 1.35 * rows, rows, 2, grid="y", sharex=True, sharey=True)
    time = np.arange(1, tasks + 1)
    for panel, axes in enumerate(panels.flat):
        for group in groups:
            matrices = np.stack([run.measured for run in group.runs])
            values = np.nanmean(matrices, axis=2) if panel == 0 else matrices[:, :, min(panel, tasks) - 1]
            if panel <= tasks:
                _draw_line(axes, time, values, group)
        axes.set_title("mean of tasks so far" if panel == 0 else f"task {panel}", pad=3)
        axes.set_visible(panel <= tasks)
    for column in range(2):
        last = max(row for row in range(rows) if panels[row, column].get_visible())
        number_tasks(panels[last, column], tasks, "after task")
        panels[last, column].tick_params(labelbottom=True)
    figure.supylabel(groups[0].measure.name, fontsize=8.5)
    legend(figure, panels[0, 0])
    return figure


@styled
def plot_plasticity(results: Results) -> Figure:
    """Return plasticity against forgetting: a mark a method, with one standard deviation over seeds to each side.

    The best corner is the upper left one, where all is learned and nothing is forgotten.
    """
    groups = groups_of(results)
    figure, panels = new_figure(2.6 + 0.16 * math.ceil(len(groups) / 3), grid="both")
    axes = panels[0, 0]
    for group in groups:
        forgetting, plasticity = group.score("forgetting"), group.score("plasticity")
        look = group.line | {"linestyle": "none", "markersize": 7, "label": figure_text(group.label)}
        spread = {"xerr": forgetting.deviation, "yerr": plasticity.deviation, "elinewidth": 1}
        axes.errorbar(forgetting.mean, plasticity.mean, **look, **spread)
    axes.margins(0.12)
    measure = groups[0].measure
    axes.set_xlabel("forgetting, points" if measure.is_accuracy else "forgetting")
    axes.set_ylabel(measure.name.replace("accuracy", "plasticity"))
    axes.set_title("better: higher, and further to the left")
    legend(figure, axes)
    return figure


@styled
def plot_scores(results: Results, published: Sequence[PublishedTable] = ()) -> Figure:
    """Return bars of ACC, BWT and plasticity, mean ± standard deviation over seeds.

    Bars of accuracies begin where their differences show, and the title says where that is.

    Args:
        results: runs of one method or several.
        published: numbers on this benchmark; those of a method that is shown are marked in its row.
    """
    groups = groups_of(results)
    marked = [table for table in published if any(_published_scores(table, group) for group in groups)]
    height = 3 * (0.5 + 0.27 * len(groups)) + 0.32 * len(marked)
    figure, panels = new_figure(height, 3, grid="x", sharey=True)
    titles: dict[Any, str] = {"acc": "ACC, %", "bwt": "BWT, points", "plasticity": "plasticity, %"}
    measure = groups[0].measure
    if not measure.is_accuracy:
        titles = {"acc": f"{measure.name} at the end", "bwt": "BWT", "plasticity": f"{measure.name} as learned"}
    for axes, (score, title) in zip(panels[:, 0], titles.items(), strict=True):
        estimates = [group.score(score) for group in groups]
        means = [estimate.mean for estimate in estimates]
        sds = [estimate.deviation or 0.0 for estimate in estimates]
        marks = [
            (number, row, at)
            for number, table in enumerate(marked)
            for row, group in enumerate(groups)
            for value in _published_scores(table, group)
            if (at := getattr(value, score, None)) is not None
        ]
        ends = [end for mean, sd in zip(means, sds, strict=True) for end in (mean - sd, mean + sd)]
        base = 0.0 if score == "bwt" else bar_base([*ends, *(at for _, _, at in marks)])
        axes.barh(range(len(groups)), np.array(means) - base, 0.62, base, color=[group.colour for group in groups])
        for row, (mean, sd) in enumerate(zip(means, sds, strict=True)):
            if sd:
                axes.errorbar(mean, row, xerr=sd, color=INK, linewidth=1, capsize=2.5)
        beyond = ends[1::2]
        for number, row, at in marks:
            axes.plot([at], [row], **_look(number), zorder=3)
            beyond[row] = max(beyond[row], at)
        label_bars(axes, means, [estimate.text() for estimate in estimates], beyond, base)
        axes.axvline(base, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(groups)), [figure_text(group.label) for group in groups])
        axes.tick_params(axis="y", length=0)
        axes.set_title(title + (f"; bars begin at {base:g}" if base else ""))
        axes.set_ylim(len(groups) - 0.4, -0.6)
    for number, table in enumerate(marked):
        label = figure_text(f"published: {printable(table.source)}", 64)
        panels[0, 0].plot([], [], **_look(number), label=label)
    if marked:
        legend(figure, panels[0, 0])
    return figure


def bar_base(values: Sequence[float]) -> float:
    """Return where bars of these accuracies begin: at 0 if their differences show from there, else nearer.

    Then the shortest bar is at least a quarter of the range of values long.

    >>> bar_base([98.1, 97.8, 95.8]), bar_base([98.1, 40.0]), bar_base([98.1])
    (95.0, 0.0, 0.0)
    """
    low, high = min(values), max(values)
    if not 0 < high - low < high / 2:
        return 0.0
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    return max(0.0, round(math.floor((low - (high - low) / 4) / step) * step, 9))


def published_names(method: str) -> list[str]:
    """Return the names under which sources may list a method: BECAME's on GPM unless it names a projector."""
    base = method.replace("-paper", "")
    return [base.replace("+", "-")] + ([f"{base}-gpm"] if base == "became" else [])


def _published_scores(table: PublishedTable, group: Group) -> list[PublishedScores]:
    return [table.methods[name] for name in published_names(group.runs[0].method) if name in table.methods]


def _look(number: int) -> dict[str, Any]:
    """How the marks of the source of that number look."""
    return {
        "marker": _MARKS[number % len(_MARKS)],
        "linestyle": "none",
        "markerfacecolor": PAPER,
        "markeredgecolor": INK,
        "markersize": 5.5,
    }


def _draw_line(axes: Axes, time: NDArray[np.int_], values: NDArray[np.float64], group: Group) -> None:
    """A group's mean over seeds [seeds, T], and one standard deviation to either side."""
    mean = values.mean(axis=0)
    axes.plot(time, mean, **group.line, label=figure_text(group.label))
    if len(values) > 1:
        sd = values.std(axis=0, ddof=1)
        above = np.minimum(mean + sd, 100) if group.measure.is_accuracy else mean + sd
        axes.fill_between(time, mean - sd, above, color=group.colour, alpha=0.18, linewidth=0)
