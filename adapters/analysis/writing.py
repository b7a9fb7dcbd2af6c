"""``report.html``, and its figures as PNG and SVG files in ``figures`` beside it."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from adapters.analysis.accuracy import (
    Published,
    accuracy_limits,
    plot_accuracy_matrix,
    plot_accuracy_over_time,
    plot_scores,
)
from adapters.analysis.checking import printed
from adapters.analysis.cost import plot_ranks, plot_seconds
from adapters.analysis.drawing import picture
from adapters.analysis.groups import Group, groups_of, spread
from adapters.analysis.learning import has_curves, plot_learning_curves
from adapters.analysis.merging import merged_tasks, plot_alpha, plot_path
from adapters.analysis.page import Drawing, page
from adapters.runs import RunResult
from became_core import BecameError

__all__ = ["write_report"]


def write_report(results: Sequence[RunResult], folder: Path, published: Sequence[Published] = ()) -> Path:
    """Write the report of these runs and return its file.

    Args:
        results: finished runs of one benchmark.
        folder: where ``report.html`` and ``figures`` go; it is made if it is not there.
        published: what has been published of the benchmark; shown only if the runs learned all of its tasks.

    Raises:
        BecameError: if there are no runs, they cannot be shown together, or a file cannot be written.
    """
    groups = groups_of(results)
    if any(run.config.get("first") != run.config.get("tasks") for group in groups for run in group.runs):
        published = ()
    limits = accuracy_limits(groups)
    shared, own = _shared(groups, published), [_own(group, limits) for group in groups]
    target = folder / "report.html"
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for drawing in [*shared, *(each for drawings in own for each in drawings)]:
            for kind in ("png", "svg"):
                (folder / "figures" / f"{drawing.name}.{kind}").write_bytes(picture(drawing.figure, kind))
        target.write_text(page(groups, shared, own, published), encoding="utf-8")
    except OSError as error:
        raise BecameError(f"cannot write to {printed(folder)}: {error.strerror}; choose another --into.") from None
    return target


def _shared(groups: Sequence[Group], published: Sequence[Published]) -> list[Drawing]:
    scores = "; ".join(f"{group.label} {spread([run.scores.acc for run in group.runs])}" for group in groups)
    seconds = "; ".join(f"{group.label} {spread([run.seconds['total'] for run in group.runs], 0)}" for group in groups)
    beside = " Open marks: published, under protocols of their own." if published else ""
    drawings = [
        Drawing(
            "scores",
            plot_scores(groups, published),
            f"Bars of average accuracy, backward transfer and plasticity. Average accuracy in percent: {scores}.",
            f"Task-incremental scores; thin lines: ± one standard deviation over seeds.{beside}",
        ),
        Drawing(
            "accuracy-over-time",
            plot_accuracy_over_time(groups),
            "Lines of the accuracy of each task from its own end on; the tables of each method hold the values.",
            "How each task fares while later ones are learned; shaded: ± one standard deviation.",
        ),
    ]
    merging = [group for group in groups if any(merged_tasks(run) for run in group.runs)]
    if merging:
        alphas = "; ".join(f"{group.label} {_alphas(group)}" for group in merging)
        caption = "The merging coefficient of each task. Open marks: single seeds."
        drawings.append(Drawing("alpha", plot_alpha(groups), f"Lines of alpha by task: {alphas}.", caption))
    alt = f"Bars of the time in each phase. In all, in seconds: {seconds}."
    drawings.append(Drawing("seconds", plot_seconds(groups), alt, "Where the time went."))
    return drawings


def _alphas(group: Group) -> str:
    """The coefficients of the group's first seed."""
    return " ".join("–" if alpha is None else f"{alpha:.2f}" for alpha in group.runs[0].alpha)


def _own(group: Group, limits: tuple[float, float]) -> list[Drawing]:
    matrix = plot_accuracy_matrix(group, limits=limits)
    drawings = [
        Drawing(
            _file_name(group, "accuracy"),
            matrix,
            f"Heat map of the accuracy of each task after each task, {group.label}; a table below holds the values.",
            f"Row: after which task; column: of which task. One scale for all methods, {limits[0]} to {limits[1]} %.",
        )
    ]
    if any(group.runs[0].ranks):
        last = "; ".join(f"{name} {rank} of {width}" for name, (rank, width) in group.runs[0].ranks[-1].items())
        alt = f"Heat map of projector ranks by layer and task, {group.label}. After the last task: {last}."
        caption = "Protected directions of each layer's inputs after each task; the colour is their share of the width."
        drawings.append(_drawing(group, "ranks", plot_ranks, alt, caption))
    if any(map(has_curves, group.runs)):
        alt = f"Curves of the training loss by epoch, {group.label}. Last of each task: {_losses(group)}."
        caption = "Training loss of each epoch, a line a seed; validation loss where samples are held out."
        drawings.append(_drawing(group, "learning", plot_learning_curves, alt, caption))
    for run in group.runs:
        if run.paths:
            alt = f"Curves of loss and accuracy along each merging path, {group.label}, seed {run.seed}. Alpha: "
            alt += " ".join(f"{run.alpha[task - 1]:.2f} into task {task}" for task in merged_tasks(run)) + "."
            caption = f"Seed {run.seed}. Left: loss of all tasks so far, and the default estimator's parabola from the "
            caption += "true loss at stage 1's end. Right: mean accuracy over tasks so far."
            one = Group(group.label, (run,), group.place)
            drawings.append(_drawing(one, f"path-seed{run.seed}", plot_path, alt, caption))
    return drawings


def _losses(group: Group) -> str:
    """The last loss of each task, of the first seed that has recorded it."""
    run = next(filter(has_curves, group.runs))
    return " ".join(f"{curve[-1]['loss']:.3f}" if curve else "–" for curve in run.curves)


def _drawing(group: Group, what: str, plot: Callable[[Group], Figure], alt: str, caption: str) -> Drawing:
    return Drawing(_file_name(group, what), plot(group), alt, caption)


def _file_name(group: Group, what: str) -> str:
    """A name that no method's name can lead out of the folder, and that no two figures share."""
    name = re.sub(r"[^a-z0-9]+", "-", group.label.lower()).strip("-")[:40]
    return f"method{group.place}-{name}-{what}".replace("--", "-")
