"""Figures of training: the loss of every epoch, over all tasks.

Convention: losses are means of the cross-entropy over samples, in nats: of training, over an epoch, as the weights went
and with dropout; of validation at the epoch's end, without.
"""

import numpy as np
from matplotlib.figure import Figure

from adapters.analysis.drawing import MUTED, legend, new_figure, styled
from adapters.analysis.groups import Results, groups_of
from adapters.runs import RunResult
from became_core import BecameError

__all__ = ["has_curves", "plot_learning_curves"]


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
        raise BecameError("no run has recorded its epochs; those of earlier versions have not.")
    figure, panels = new_figure(0.5 + 1.5 * len(groups), len(groups), grid="y", sharex=True)
    for axes, group in zip(panels[:, 0], groups, strict=True):
        first = next(run for run in group.runs if has_curves(run))
        starts = np.cumsum([0, *(len(curve) for curve in first.curves)])
        for start in starts[1:-1]:
            axes.axvline(start + 0.5, color=MUTED, linewidth=0.6, linestyle=":")
        labelled: set[str] = set()
        for run in filter(has_curves, group.runs):
            for epochs, stage, losses, held_out in _stretches(run):
                for name, values, style in (
                    (f"stage {stage}", losses, "-" if stage == 1 else "--"),
                    ("validation", held_out, ":"),
                ):
                    if not np.isfinite(values).any():
                        continue
                    look = {"color": MUTED if name == "validation" else group.colour, "linestyle": style}
                    axes.plot(epochs, values, **look, marker=".", label=None if name in labelled else name)
                    labelled.add(name)
        axes.set_ylabel("loss, nats")
        if len(groups) > 1:
            axes.set_title(group.name)
    panels[-1, 0].set_xlabel("epoch; dotted: a task begins")
    legend(figure, max(panels[:, 0], key=lambda axes: len(axes.get_legend_handles_labels()[0])))
    return figure


def _stretches(run: RunResult) -> list[tuple[list[int], int, list[float], list[float]]]:
    """Each stage of each task: the numbers of its epochs in the run, the stage, training and validation losses."""
    found: list[tuple[list[int], int, list[float], list[float]]] = []
    epoch = 0
    for curve in run.curves:
        for place, each in enumerate(curve):
            epoch += 1
            if place == 0 or each["stage"] != found[-1][1]:
                found.append(([], each["stage"], [], []))
            epochs, _, losses, held_out = found[-1]
            epochs.append(epoch)
            losses.append(each["loss"])
            held_out.append(each["validation_loss"])
    return found
