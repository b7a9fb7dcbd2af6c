"""Figures of cost: how much of each layer is protected, and where the time went.

Convention: a rank counts protected directions, a width all of them; seconds are means over seeds.
"""

import math

import numpy as np
from matplotlib.figure import Figure

from adapters.analysis.drawing import heat_map, label_bars, new_figure, shown, styled
from adapters.analysis.groups import Group, Results, groups_of
from became_core import BecameError

__all__ = ["phases", "plot_ranks", "plot_seconds"]

_NOTHING = (math.nan, math.nan)


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
        group.label: list(dict.fromkeys(name for each in group.runs[0].ranks for name in each)) for group in groups
    }
    heights = [0.85 + 0.27 * len(layers[group.label]) for group in groups]
    figure, panels = new_figure(sum(heights), len(groups), height_ratios=heights)
    for group, axes in zip(groups, panels[:, 0], strict=True):
        names = layers[group.label]
        found = np.array([[[each.get(name, _NOTHING) for each in run.ranks] for name in names] for run in group.runs])
        ranks, widths = np.moveaxis(found, -1, 0)
        mean, width = ranks.mean(axis=0), widths[0]
        heat_map(axes, 100 * mean / width, [[f"{rank:.0f}" for rank in row] for row in mean], (0, 100), "% of width")
        labels = [f"{shown(name, 22)} / {np.nanmax(row):.0f}" for name, row in zip(names, width, strict=True)]
        axes.set_yticks(range(1, len(names) + 1), labels)
        axes.set_xlabel("after task")
        axes.set_ylabel("layer / width")
        axes.set_title(f"{group.name}: rank; lighter: nearer the width")
    return figure


@styled
def plot_seconds(results: Results) -> Figure:
    """Return the time that each method spent in each phase, and in all; one scale for all phases."""
    groups = groups_of(results)
    spent = {group.label: phases(group) for group in groups}
    names = [*dict.fromkeys(name for each in spent.values() for name in each if name != "total"), "total"]
    longest = max(each["total"] for each in spent.values())
    unit, divisor = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 600 else ("seconds", 1)
    rows = math.ceil(len(names) / 2)
    figure, panels = new_figure(rows * (0.35 + 0.2 * len(groups)) + 0.35, rows, 2, grid="x", sharex=True, sharey=True)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for name, axes in zip(names, panels.flat, strict=False):
        values = [spent[group.label].get(name, 0.0) / divisor for group in groups]
        axes.barh(range(len(groups)), values, 0.62, color=[group.colour for group in groups])
        axes.set_title(name if name == "total" else shown(name, 24), pad=3)
        axes.set_yticks(range(len(groups)), [shown(group.label, 20) for group in groups])
        axes.tick_params(axis="y", length=0)
        label_bars(axes, values, [_amount(value) for value in values], values)
    axes = panels[0, 0]
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.22 * longest / divisor)
    figure.supxlabel(f"{unit}, mean over seeds", fontsize=8.5)
    return figure


def phases(group: Group) -> dict[str, float]:
    """Return the mean seconds of each phase; what the total holds beyond them as ``other``; and the total last."""
    names = dict.fromkeys(name for run in group.runs for name in run.seconds if name != "total")
    found = {name: float(np.mean([run.seconds.get(name, 0.0) for run in group.runs])) for name in names}
    total = float(np.mean([run.seconds["total"] for run in group.runs]))
    other = total - sum(found.values())
    if other > 0.005 * total:
        found["other"] = found.get("other", 0.0) + other
    return found | {"total": total}


def _amount(value: float) -> str:
    return "–" if not value else "< 0.01" if value < 0.01 else f"{value:.3g}"
