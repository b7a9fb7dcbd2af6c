"""``report.html``, and its figures as PNG and SVG files in ``figures`` beside it; the two figures of all runs alone."""

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from adapters.analysis.bootstrap import Estimate
from adapters.analysis.comparison import gather
from adapters.analysis.figures.accuracy import (
    accuracy_limits,
    groups_by_epochs,
    plot_accuracy_matrix,
    plot_accuracy_over_time,
    plot_epochs,
    plot_plasticity,
    plot_scores,
)
from adapters.analysis.figures.drawing import Figure, picture, themed_svg
from adapters.analysis.figures.training import (
    has_curves,
    plot_alpha,
    plot_learning_curves,
    plot_path,
    plot_ranks,
    plot_seconds,
)
from adapters.analysis.groups import Group, Results, groups_of, have_spread
from adapters.analysis.page import Drawing, page
from adapters.analysis.path_report import merged_tasks, traced_tasks
from adapters.analysis.tables import printable
from adapters.runs.published import PublishedTable, published_tables
from became_core import BecameError

__all__ = ["report", "write_figures", "write_report"]


def report(outs: Sequence[Path], into: Path | None = None) -> Path:
    """Write the report of the finished runs in some folders and return its file.

    Args:
        outs: folders that ``--out`` named.
        into: the folder of the report; the first of ``outs`` if None.

    Raises:
        BecameError: if there is nothing to report, or a file is damaged or cannot be written.
    """
    if not outs:
        raise BecameError("there is nothing to report on; give a folder that --out named.")
    groups = gather(outs)
    first = groups[0].runs[0]
    return write_report(groups, into or outs[0], published_tables(first.benchmark, len(first.accuracy)))


def write_figures(outs: Sequence[Path], into: Path | None = None, only: str | None = None) -> list[Path]:
    """Write the figures that compare all runs, and return their files.

    ``plasticity.svg`` has plasticity against forgetting, a point a seed; ``epochs.svg`` has accuracy against the epochs
    spent on a task, a line for each method that ran for several numbers of epochs.

    Args:
        outs: folders that ``--out`` named.
        into: the folder of the figures; the first of ``outs`` if None.
        only: the name of the one figure that is to be drawn. If None, ``epochs`` is left out where no method has a
            line, and with a warning where no line can join the runs of a method.

    Raises:
        BecameError: if there is nothing to draw, runs cannot be shown together, or a file cannot be written.
    """
    if not outs:
        raise BecameError("there is nothing to draw; give a folder that --out named.")
    groups = gather(outs)
    backends = {run.backend: run for group in groups for run in group.runs}
    if len(backends) > 1:
        raise BecameError(
            f"these runs are on {' and '.join(sorted(map(printable, backends)))}; draw one backend's runs."
        )
    drawings = [] if only == "epochs" else [_plasticity(groups)]
    if only != "plasticity":
        drawings += _epochs(groups) if only else _epochs_or_warning(groups)
    if not drawings:
        plot_epochs(groups)  # it says what is missing
    folder = into or outs[0]
    files = [folder / f"{drawing.name}.svg" for drawing in drawings]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, drawing in zip(files, drawings, strict=True):
            file.write_bytes(themed_svg(drawing.svg))
    except OSError as error:
        raise BecameError(
            f"cannot write to {printable(str(folder))}: {error.strerror}; choose another --into."
        ) from None
    return files


def write_report(results: Results, folder: Path, published: Sequence[PublishedTable] = ()) -> Path:
    """Write the report of these runs and return its file.

    Args:
        results: finished runs of one benchmark, or groups of them as ``gather`` names them.
        folder: where ``report.html`` and ``figures`` go; it is created if it does not exist.
        published: published numbers of the benchmark; they are shown only if the runs learned all of its tasks and were
            scored on test samples.

    Raises:
        BecameError: if there are no runs, they cannot be shown together, or a file cannot be written.
    """
    groups = groups_of(results)
    runs = [run for group in groups for run in group.runs]
    if any(run.config.get("first") != run.config.get("tasks") or not run.on_test_samples for run in runs):
        published = ()
    limits = accuracy_limits(groups)
    shared, own = _shared(groups, published), [_own(group, limits) for group in groups]
    target = folder / "report.html"
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for drawing in [*shared, *(drawing for drawings in own for drawing in drawings)]:
            (folder / "figures" / f"{drawing.name}.svg").write_bytes(themed_svg(drawing.svg))
            (folder / "figures" / f"{drawing.name}.png").write_bytes(picture(drawing.figure, "png"))
        target.write_text(page(groups, shared, own, published), encoding="utf-8")
    except OSError as error:
        raise BecameError(
            f"cannot write to {printable(str(folder))}: {error.strerror}; choose another --into."
        ) from None
    return target


def _shared(groups: Sequence[Group], published: Sequence[PublishedTable]) -> list[Drawing]:
    """The figures of all groups together."""
    times = [Estimate(tuple(run.seconds["total"] for run in group.runs)).text(0) for group in groups]
    scores = "; ".join(f"{group.label} {group.score('acc').text()}" for group in groups)
    seconds = "; ".join(f"{group.label} {text}" for group, text in zip(groups, times, strict=True))
    several, measure = have_spread(groups), groups[0].measure.word
    shaded = "; shaded: ± one standard deviation" if several else ""
    lines = "; thin lines: ± one standard deviation over seeds" if several else ""
    beside = " Open marks: published, under protocols of their own." if published else ""
    drawings = [
        Drawing(
            "scores",
            plot_scores(groups, published),
            f"Bars of the average {measure}, backward transfer and plasticity. Averages: {scores}.",
            f"Task-incremental scores; bars of accuracies begin where the title says{lines}.{beside}",
        ),
        Drawing(
            "accuracy-over-time",
            plot_accuracy_over_time(groups),
            f"Lines of each task's {measure} from its own end on; the tables of each method hold the values.",
            f"Each task's {measure} while later ones are learned{shaded}.",
        ),
    ]
    if len(groups[0].runs[0].accuracy) > 1:
        drawings.append(_plasticity(groups))
    with suppress(BecameError):  # if it is not clear which runs a line joins; the table has them all
        drawings += _epochs(groups)
    merging = [group for group in groups if any(merged_tasks(run) for run in group.runs)]
    if merging:
        first = [[_shown(alpha) for alpha in group.runs[0].alpha] for group in merging]
        alphas = "; ".join(f"{group.label} {' '.join(texts)}" for group, texts in zip(merging, first, strict=True))
        caption = "The merging coefficient of each task: at 0 stage 2 is thrown away, at 1 stage 1."
        caption += " Open marks: single seeds." if several else ""
        drawings.append(Drawing("alpha", plot_alpha(groups), f"Lines of alpha by task: {alphas}.", caption))
    alt = f"Bars of the time in each phase. In all, in seconds: {seconds}."
    drawings.append(Drawing("seconds", plot_seconds(groups), alt, "Where the time went."))
    return drawings


def _plasticity(groups: Sequence[Group]) -> Drawing:
    """Plasticity against forgetting."""
    measure, small = groups[0].measure, " Small marks: single seeds." if have_spread(groups) else ""
    pairs = "; ".join(
        f"{group.label} {group.score('forgetting').text()}, {group.score('plasticity').text()}" for group in groups
    )
    return Drawing(
        "plasticity",
        plot_plasticity(groups),
        f"Each method's plasticity against its forgetting. Forgetting, plasticity ({measure.name}): {pairs}.",
        f"Plasticity: {measure.word} on each task as it was learned. Forgetting: how far it fell from its best.{small}",
    )


def _epochs(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy against epochs, if any method has runs of several numbers of epochs."""
    lines = groups_by_epochs(groups)
    if not lines:
        return []
    points = {
        method: ", ".join(f"{group.score('acc').text()} at {group.epochs.mean:.4g}" for group in line)
        for method, line in lines.items()
    }
    alt = "; ".join(f"{method} {text}" for method, text in points.items())
    bars = "; bars: ± one standard deviation over seeds" if have_spread(groups) else ""
    caption = f"The mean {groups[0].measure.word} at the end by the epochs of both stages, a mean over tasks{bars}."
    return [Drawing("epochs", plot_epochs(groups), f"Lines of the mean accuracy by epochs a task: {alt}.", caption)]


def _epochs_or_warning(groups: Sequence[Group]) -> list[Drawing]:
    """What ``_epochs`` returns; where no line can join the runs of a method, nothing, and a warning says why."""
    try:
        return _epochs(groups)
    except BecameError as error:
        warnings.warn(f"epochs.svg is left out: {error}", stacklevel=3)
        return []


def _own(group: Group, limits: tuple[float, float]) -> list[Drawing]:
    """The figures of one group."""
    matrix, measure = plot_accuracy_matrix(group, limits=limits), group.measure
    scale = f"{limits[0]:.3g} to {limits[1]:.3g} ({measure.name})"
    drawings = [
        Drawing(
            _file_name(group, "accuracy"),
            matrix,
            f"Heat map of each task's {measure.word} after each, {group.label}; a table below has the values.",
            f"Row: after which task; column: of which task. One scale for all methods, {scale}.",
        )
    ]
    if any(group.runs[0].ranks):
        last = "; ".join(f"{name} {rank} of {width}" for name, (rank, width) in group.runs[0].ranks[-1].items())
        alt = f"Heat map of projector ranks by layer and task, {group.label}. After the last task: {last}."
        caption = "Protected directions of each layer's inputs after each task; the colour is their share of the width."
        drawings.append(_drawing(group, "ranks", plot_ranks, alt, caption))
    if any(map(has_curves, group.runs)):
        curves = next(filter(has_curves, group.runs)).curves
        losses = " ".join(f"{curve[-1]['loss']:.3f}" if curve else "–" for curve in curves)
        alt = f"Curves of the training loss by epoch, {group.label}. Last of each task: {losses}."
        seeds = ", a line a seed" if len(group.runs) > 1 else ""
        caption = f"Training loss of each epoch{seeds}; validation loss where samples are held out."
        drawings.append(_drawing(group, "learning", plot_learning_curves, alt, caption))
    for run in group.runs:
        if run.paths:
            alt = f"Curves of loss and accuracy along each merging path, {group.label}, seed {run.seed}. Alpha: "
            alt += " ".join(f"{_shown(run.alpha[task - 1])} into task {task}" for task in traced_tasks(run)) + "."
            caption = f"Seed {run.seed}. Left: loss of all tasks so far, and the default estimator's parabola from the "
            caption += "true loss at stage 1's end. Right: mean accuracy over tasks so far."
            one = Group(group.label, (run,), group.place)
            drawings.append(_drawing(one, f"path-seed{run.seed}", plot_path, alt, caption))
    return drawings


def _drawing(group: Group, what: str, plot: Callable[[Group], Figure], alt: str, caption: str) -> Drawing:
    return Drawing(_file_name(group, what), plot(group), alt, caption)


def _file_name(group: Group, what: str) -> str:
    """A name of files; no two figures share one, and no method's name can lead out of the folder."""
    name = re.sub(r"[^a-z0-9]+", "-", group.label.lower()).strip("-")[:40]
    return f"method{group.place}-{name}-{what}".replace("--", "-")


def _shown(alpha: float | None) -> str:
    return "–" if alpha is None else f"{alpha:.2f}"
