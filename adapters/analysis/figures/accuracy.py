"""Figures of accuracy: the matrix, over time, over epochs, plasticity and forgetting, and scores beside published ones.

Convention: percent, task-incremental; row t of a matrix is the state after task t. Several seeds give their mean, and
their standard deviation where there is room for it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from adapters.analysis.figures.drawing import (
    INK,
    MUTED,
    PAPER,
    figure_text,
    heat_map,
    label_bars,
    label_points,
    legend,
    new_figure,
    number_tasks,
    styled,
)
from adapters.analysis.groups import MARKERS, Group, Results, groups_of, have_spread
from adapters.analysis.tables import printable
from adapters.runs.published import PublishedScores, PublishedTable
from became_core import BecameError

__all__ = [
    "accuracy_limits",
    "bar_base",
    "groups_by_epochs",
    "plot_accuracy_matrix",
    "plot_accuracy_over_time",
    "plot_epochs",
    "plot_plasticity",
    "plot_scores",
    "published_names",
]

_MARKS = ("D", "^", "v", "s", "P")
# What runs may differ in and still be one method at several schedules: what the presets quick and paper of CIFAR-100
# differ in, the precision among it, which after long training is calibrated across; and what draws dropout's masks,
# which is another on a GPU.
_SCHEDULE = {"schedule", "epochs", "stage2_epochs", "lr", "lr_factor", "lr_steps", "lr_patience", "lr_minimum"}
_SCHEDULE |= {"precision", "curvature_samples", "path_points", "dropout_masks"}


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
    """Return plasticity against forgetting: a large mark for each method's mean, a small one for each of its seeds.

    The best corner is the upper left one, where all is learned and nothing is forgotten.
    """
    groups = groups_of(results)
    figure, panels = new_figure(2.8 + 0.09 * len(groups), grid="both")
    axes = panels[0, 0]
    means, seeds = [], []
    for group in groups:
        forgetting, plasticity = group.score("forgetting"), group.score("plasticity")
        look = group.line | {"linestyle": "none", "label": figure_text(group.label)}
        if group.place >= len(MARKERS):  # as colours and marks repeat, these are hollow
            look["markerfacecolor"] = PAPER
        if len(group.runs) > 1:
            axes.plot(forgetting.values, plasticity.values, **look | {"label": None}, markersize=3.5, alpha=0.5)
            for seed in zip(forgetting.values, plasticity.values, strict=True):
                ends = zip((forgetting.mean, plasticity.mean), seed, strict=True)
                axes.plot(*ends, color=group.colour, linewidth=0.8, alpha=0.35, zorder=1)
                seeds.append(seed)
        axes.plot(forgetting.mean, plasticity.mean, **look, markersize=7, zorder=3)
        means.append((forgetting.mean, plasticity.mean))
    axes.margins(0.15)
    measure = groups[0].measure
    axes.set_xlabel("forgetting, points" if measure.is_accuracy else "forgetting")
    axes.set_ylabel(measure.name.replace("accuracy", "plasticity"))
    axes.set_title("better: higher, and further to the left" + ("; small: single seeds" if seeds else ""))
    label_points(axes, [figure_text(group.label) for group in groups], np.array(means), np.array([*seeds, *means]))
    return figure


def groups_by_epochs(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the groups of each method that ran for several numbers of epochs a task, the fewest epochs first.

    Raises:
        BecameError: if two groups of a method ran for equally many epochs, or differ in more than their schedule, so
            that no line can join them.
    """
    methods: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.epochs.mean):
        methods.setdefault(group.runs[0].method, []).append(group)
    methods = {method: methods[method] for method in dict.fromkeys(group.runs[0].method for group in groups)}
    for first, *others in methods.values():
        for one, other in zip([first, *others], others, strict=False):
            names = f"{printable(one.label)} and {printable(other.label)}"
            runs = one.runs[0], other.runs[0]
            if runs[0].backend != runs[1].backend:
                raise BecameError(f"{names} ran on {runs[0].backend} and {runs[1].backend}; draw runs of one backend.")
            both = runs[0].config.keys() & runs[1].config.keys() - _SCHEDULE
            values = {name: [run.config[name] for run in runs] for name in sorted(both)}
            differing = [name for name, (ours, theirs) in values.items() if ours != theirs]
            # Older versions recorded a table where there is one word now, such as the optimiser's.
            differing = [name for name in differing if not any(isinstance(value, dict) for value in values[name])]
            if differing:
                raise BecameError(f"{names} differ in {differing[0]}, not only in their schedule; leave one out.")
            if round(one.epochs.mean, 1) == round(other.epochs.mean, 1):
                raise BecameError(f"{names} both took {one.epochs.mean:.4g} epochs a task; leave one out.")
    return {method: line for method, line in methods.items() if len(line) > 1}


@styled
def plot_epochs(results: Results) -> Figure:
    """Return the mean accuracy at the end against the epochs spent on a task, those of both stages: a line a method.

    Each mark is the mean over the seeds of one schedule, with one standard deviation to each side.

    Raises:
        BecameError: if no method ran for several numbers of epochs, or a line cannot be drawn for another reason, as
            ``groups_by_epochs`` says.
    """
    groups = groups_of(results)
    lines = groups_by_epochs(groups)
    if not lines:
        raise BecameError(
            "no method has runs of two numbers of epochs; give folders of several schedules, as of --epochs 6 and 20."
        )
    figure, panels = new_figure(2.8 + 0.16 * math.ceil(len(lines) / 3), grid="both")
    axes = panels[0, 0]
    for number, (method, line) in enumerate(lines.items()):
        epochs, scores = [group.epochs for group in line], [group.score("acc") for group in line]
        means = [[estimate.mean for estimate in estimates] for estimates in (epochs, scores)]
        look = min(line, key=lambda group: group.place).line
        drawn: list[Artist] = [*axes.plot(*means, **look, markersize=5, label=figure_text(method))]
        spreads = [
            [math.nan if estimate.deviation is None else estimate.deviation for estimate in estimates]
            for estimates in (scores, epochs)
        ]
        bars: dict[str, Any] = {"fmt": "none", "ecolor": look["color"], "elinewidth": 1, "capsize": 2}
        drawn += axes.errorbar(*means, *spreads, **bars).get_children()
        # Marks of equally many epochs stand side by side, so that each bar is seen.
        aside = ScaledTranslation((number - (len(lines) - 1) / 2) / 20, 0, figure.dpi_scale_trans)
        for artist in drawn:
            artist.set_transform(axes.transData + aside)
    least, *_, most = sorted(group.epochs.mean for line in lines.values() for group in line)
    if most > 4 * least:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.08)
    axes.set_xlabel("epochs a task, of both stages together")
    measure = groups[0].measure
    axes.set_ylabel(measure.name.replace("accuracy", "mean accuracy at the end"))
    if have_spread([group for line in lines.values() for group in line]):
        axes.set_title("bars: ± one standard deviation over seeds")
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
