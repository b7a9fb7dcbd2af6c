"""Each figure shows what its runs hold, whatever they lack, and looks at nothing else."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from adapters.analysis.figures import (
    plot_accuracy_matrix,
    plot_accuracy_over_time,
    plot_alpha,
    plot_epochs,
    plot_learning_curves,
    plot_path,
    plot_plasticity,
    plot_ranks,
    plot_scores,
    plot_seconds,
)
from adapters.analysis.figures.accuracy import bar_base, groups_by_epochs
from adapters.analysis.figures.drawing import MUTED, picture
from adapters.analysis.figures.training import predicted_loss
from adapters.analysis.groups import groups_of
from adapters.runs import RunResult
from adapters.runs.configuration import Configuration
from adapters.runs.published import PublishedScores, PublishedTable
from became_core import BecameError
from tests.analysis.runs import CONFIG, path, plain, run

ALWAYS = [plot_accuracy_matrix, plot_accuracy_over_time, plot_plasticity, plot_scores, plot_seconds]
ALL = [*ALWAYS, plot_alpha, plot_learning_curves, plot_path, plot_ranks]


def published_table(**scores: PublishedScores) -> PublishedTable:
    return PublishedTable("a source", "a protocol", {name.replace("_", "-"): score for name, score in scores.items()})


def texts(figure: Figure) -> list[str]:
    """Everything that is written in the axes of a figure."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("plot", ALL)
def test_a_figure_can_be_drawn_and_is_the_same_each_time(plot: Callable[[Any], Figure]) -> None:
    runs = [run(seed=0), run(seed=1), plain()]
    figure = plot(runs)
    first = picture(figure, "svg")
    assert first == picture(plot(runs), "svg")
    assert b"<svg" in first
    assert picture(figure, "png", dpi=30).startswith(b"\x89PNG")


@pytest.mark.parametrize("plot", ALWAYS)
@pytest.mark.parametrize("runs", [plain(), plain(tasks=1), [plain(tasks=1), plain("gpm", tasks=1)]])
def test_one_task_and_runs_without_merges_or_ranks_are_drawn(plot: Callable[[Any], Figure], runs: Any) -> None:
    assert b"<svg" in picture(plot(runs), "svg")


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (plot_alpha, "merged"),
        (plot_learning_curves, "recorded its epochs"),
        (plot_path, "--path-points"),
        (plot_ranks, "protected"),
    ],
)
def test_a_figure_of_nothing_is_refused(plot: Callable[[Any], Figure], message: str) -> None:
    with pytest.raises(BecameError, match=message):
        plot(plain())


def test_the_matrix_holds_the_mean_over_seeds_and_leaves_the_future_out() -> None:
    figure = plot_accuracy_matrix([run(seed=0), run(seed=1)])
    assert texts(figure) == ["90.5", "89.5", "90.5", "88.5", "89.5", "90.5"]


def test_large_matrices_have_a_scale_instead_of_numbers() -> None:
    figure = plot_accuracy_matrix(plain(tasks=20))
    assert texts(figure) == []
    assert len(figure.axes) == 2


def test_time_begins_with_a_tasks_own_end() -> None:
    figure = plot_accuracy_over_time(run())
    mean, *tasks = (axes.lines[0].get_ydata() for axes in figure.axes[:4])
    assert np.asarray(mean) == pytest.approx([90.0, 89.5, 89.0])
    assert np.isnan(np.asarray(tasks[1])).tolist() == [True, False, False]
    assert np.asarray(tasks[2])[2] == 90.0


def test_bars_show_mean_and_spread_and_the_published_numbers_of_that_method_alone() -> None:
    published = published_table(
        became_gpm=PublishedScores(75.05), gpm=PublishedScores(72.48, -0.9), hat=PublishedScores(72.06, 0.0)
    )
    runs = [run(seed=0), run(seed=1), plain("gpm")]
    figure = plot_scores(runs, [published])
    assert texts(figure)[0] == "89.50 ± 0.71"
    marks = [line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == "D" and len(line.get_xdata())]  # type: ignore[arg-type]
    assert [float(np.asarray(each)[0]) for each in marks] == [75.05, 72.48]
    assert len(plot_scores(runs, [published_table(hat=PublishedScores(72.06))]).legends) == 0


def test_bars_of_accuracies_begin_where_their_differences_show() -> None:
    """98.10, 97.80 and 95.80 looked equal when bars began at 0."""
    runs = [run(method, accuracy=np.full((3, 3), value)) for method, value in (("a", 98.1), ("b", 97.8), ("c", 95.8))]
    acc, bwt, plasticity = plot_scores(runs).axes
    bars = [bar.get_extents().transformed(acc.transData.inverted()) for bar in acc.patches]
    assert [bar.x0 for bar in bars] == pytest.approx([95.0] * 3)
    assert [bar.x1 for bar in bars] == pytest.approx([98.1, 97.8, 95.8])
    assert acc.get_xlim()[0] == 95.0
    assert [axes.get_title(loc="left") for axes in (acc, bwt)] == ["ACC, %; bars begin at 95", "BWT, points"]
    assert plasticity.get_title(loc="left") == "plasticity, %; bars begin at 95"
    assert texts(plot_scores(runs))[:3] == ["98.10", "97.80", "95.80"]


@pytest.mark.parametrize(
    ("values", "base"),
    [
        ([98.1], 0.0),
        ([98.0, 98.0], 0.0),
        ([30.0, 90.0], 0.0),
        ([60.0, 80.0], 50.0),
        ([98.0, 98.3], 97.9),
        ([99.99, 100.0], 99.987),
    ],
)
def test_bars_begin_at_zero_where_nothing_differs_or_all_shows(values: list[float], base: float) -> None:
    assert bar_base(values) == pytest.approx(base)


def marks(file: bytes, colour: str, axis: str) -> list[float]:
    """Where the marks of a colour are in an SVG file, read by the numbers at its ticks; on a log axis as logarithms."""
    text = re.sub(r"<style>.*?</style>", "", file.decode(), flags=re.DOTALL)
    numbers, places = [], []
    for tick in re.findall(rf'<g id="{axis}tick_\d+">.*?</text>', text, re.DOTALL):
        place = re.findall(rf'<use [^>]*\b{axis}="([-\d.]+)"', tick)[-1]
        numbers.append(float(re.findall(r">([^<>]+)</text>", tick)[-1].replace("\N{MINUS SIGN}", "-")))
        places.append(float(place))
    if not np.allclose(np.diff(numbers), np.diff(numbers)[0]):
        numbers = np.log(numbers).tolist()
    slope, start = np.polyfit(places, numbers, 1)
    drawn = re.findall(rf'<use [^>]*\b{axis}="([-\d.]+)"[^>]*style="fill: {colour}', text)
    return [float(slope * float(place) + start) for place in drawn]


def test_plasticity_stands_against_forgetting_with_a_mark_for_each_seed() -> None:
    """Forgetting of these runs is 1.5 and 90 as each task was learned; a seed adds its number to all accuracies."""
    steeper = run(seed=1, accuracy=np.array([[93.0, np.nan], [90.0, 95.0]]))
    runs = [run(tasks=2), steeper, plain("gpm", tasks=2)]
    file = picture(plot_plasticity(runs), "svg")
    first, second = (group.colour for group in groups_of(runs))
    assert marks(file, first, "x") == pytest.approx([1.0, 3.0, 2.0], abs=0.01)  # two seeds, then their mean
    assert marks(file, first, "y") == pytest.approx([90.0, 94.0, 92.0], abs=0.01)
    assert marks(file, second, "x") == pytest.approx([1.0], abs=0.01)  # one seed is its own mean
    assert marks(file, second, "y") == pytest.approx([90.0], abs=0.01)


@pytest.mark.parametrize(("count", "apart"), [(1, 1.0), (6, 1.0), (15, 1.0), (12, 0.0)])
def test_no_label_of_a_mean_covers_another_or_a_mark(count: int, apart: float) -> None:
    generator = np.random.default_rng(count)
    runs = [
        plain(f"became+method{number}", seed, 2, accuracy=np.array([[a, np.nan], [a - f + seed, b]]))
        for number in range(count)
        for a, b, f in (generator.normal(80, apart, 3),)
        for seed in (0, 1)
    ]
    figure = plot_plasticity(runs)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.texts]
    assert len(boxes) == count
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    frame = axes.get_window_extent()
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)
    leaders = [line for line in axes.lines if line.get_color() == MUTED]
    ends = [axes.transData.transform(line.get_xydata())[1] for line in leaders]
    assert [end for end in ends if not any(box.padded(3).contains(*end) for box in boxes)] == []
    assert bool(leaders) == (count > 6)
    centres = [
        axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_marker() not in ("", "None")
    ]
    assert not [box for box in boxes for places in centres for place in places if box.contains(*place)]


def scheduled(method: str, *epochs: int, last: float = 80.0, seed: int = 0, **config: Any) -> RunResult:
    """A run with so many epochs in each of two tasks."""
    accuracy = np.array([[90.0, np.nan], [last, last]])
    config = CONFIG | {"epochs": max(epochs), "schedule": "annealed" if max(epochs) < 50 else "patience"} | config
    return plain(method, seed, 2, accuracy=accuracy, epochs=list(epochs), config=config)


def test_accuracy_stands_against_the_epochs_that_the_runs_took() -> None:
    runs = [
        *(scheduled("gpm", 6, 6, last=70.0 + seed, seed=seed) for seed in (0, 2)),
        scheduled("gpm", 20, 20, last=72.0, optimiser="sgd", dropout_masks="numpy"),
        # A patient schedule ends when it likes. An older version recorded its optimiser so.
        scheduled("gpm", 70, 90, last=74.0, optimiser={"kind": "sgd"}, dropout_masks="framework"),
        scheduled("ewc", 20, 20, last=60.0),  # of one schedule alone, it has no line
    ]
    figure = plot_epochs(runs)
    file = picture(figure, "svg")
    colour = groups_of(runs)[0].colour
    assert marks(file, colour, "y")[:3] == pytest.approx([71.0, 72.0, 74.0], abs=0.01)
    assert marks(file, colour, "x")[:3] == pytest.approx(np.log([6.0, 20.0, 80.0]).tolist(), abs=0.01)
    (axes,) = figure.axes
    assert axes.get_legend_handles_labels()[1] == ["gpm"]
    ends = [np.asarray(path.vertices)[:, 1].tolist() for bars in axes.collections for path in bars.get_paths()]
    (spread,) = [end for end in ends if np.ptp(end) > 0]  # one seed has none
    assert spread == pytest.approx([71 - 2**0.5, 71 + 2**0.5])


def test_a_line_joins_what_the_presets_of_two_schedules_give() -> None:
    """The preset paper has a precision of its own, with which no line could be drawn to the runs of quick."""
    values = {"benchmark": "split-cifar100"}
    configs = [Configuration.of(values, "became", preset).to_json() for preset in ("quick", "paper")]
    assert configs[0]["precision"] != configs[1]["precision"]
    lines = groups_by_epochs(groups_of([scheduled("became", config["epochs"], **config) for config in configs]))
    assert [[group.epochs.mean for group in line] for line in lines.values()] == [[12.0, 200.0]]


def test_lines_of_equal_epochs_stand_side_by_side() -> None:
    runs = [scheduled(method, epochs) for method in ("gpm", "ewc") for epochs in (4, 6)]
    file = picture(plot_epochs([replace(run, epochs=run.epochs * 2) for run in runs]), "svg")
    first, second = (marks(file, group.colour, "x")[:2] for group in groups_of(runs)[::2])
    assert first != second
    assert np.mean([first, second], axis=0) == pytest.approx([4.0, 6.0], abs=0.01)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (scheduled("gpm", 4, 8, schedule="stepped"), r"both took 6 epochs a task; leave one out"),
        (scheduled("gpm", 20, 20, threshold=0.9), r"differ in threshold, not only in their schedule; leave one out"),
        (replace(scheduled("gpm", 20, 20), backend="jax"), r"ran on torch and jax; draw runs of one backend"),
        (scheduled("ewc", 20, 20), r"no method has runs of two numbers of epochs"),
    ],
)
def test_what_no_line_can_join_is_refused(other: RunResult, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        plot_epochs([scheduled("gpm", 6, 6, threshold=0.97), other])


def test_epochs_are_whole() -> None:
    for tasks in (1, 2, 3):
        (axes,) = plot_learning_curves(run(tasks=tasks)).axes
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_alpha_has_a_point_for_each_merge_and_each_seed() -> None:
    lines = plot_alpha([run(seed=0), run(seed=2), plain()]).axes[0].lines
    assert np.asarray(lines[0].get_ydata()) == pytest.approx([0.6, 0.6])
    assert sorted(float(np.asarray(line.get_ydata())[0]) for line in lines[1:]) == pytest.approx([0.5, 0.7])


def test_the_prediction_is_the_default_estimators_and_meets_the_truth_at_its_beginning() -> None:
    # kappa = 2 / 4; slope = -2 + 2 / 2 = -1, curvature = 1 + 2 / 2 = 2: here the truth itself.
    at = np.array([0.0, 0.5, 1.0])
    assert predicted_loss(path(0.5), at) == pytest.approx([1.25, 1.0, 1.25])


def test_a_path_marks_alpha_the_grids_minimum_and_both_ends() -> None:
    figure = plot_path(run(paths=[path(0.25), path(1.0)]))
    assert len(figure.axes) == 4
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert np.asarray(lines["least loss of the grid"].get_xdata()).tolist() == [0.25]
    assert np.asarray(lines["ends of the path"].get_xdata()).tolist() == [0.0, 1.0]
    assert np.asarray(lines["α*"].get_xdata()).tolist() == [0.5, 0.5]
    assert figure.axes[2].get_title(loc="left") == "into task 3, α* = 0.50"


def test_learning_curves_break_where_a_stage_or_a_task_begins() -> None:
    (axes,) = plot_learning_curves(run(tasks=2)).axes
    shown = [(str(line.get_label()), np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.lines]
    stages = [(x.tolist(), y.tolist()) for label, x, y in shown if y.tolist() in ([0.9, 0.5], [0.4])]
    assert stages == [([1, 2], [0.9, 0.5]), ([3], [0.4]), ([4, 5], [0.9, 0.5]), ([6], [0.4])]
    assert [x.tolist() for _, x, y in shown if y.tolist() == [0.95, 0.7]] == [[1, 2], [4, 5]]
    assert [x[0] for _, x, y in shown if len(x) == 2 and x[0] == x[1]] == [3.5]
    assert sorted(axes.get_legend_handles_labels()[1]) == ["stage 1", "stage 2", "validation"]


def test_a_prediction_far_off_does_not_flatten_the_truth() -> None:
    wild = path() | {"new": {"secant": [900.0, 900.0], "exact": [-1.0, 2.0], "diagonal": [-1.0, 4.0]}}
    low, high = plot_path(run(paths=[wild, wild])).axes[0].get_ylim()
    assert high - low < 1


def test_ranks_stand_beside_their_layers_width() -> None:
    figure = plot_ranks(run())
    assert texts(figure) == ["2", "3", "4", "1", "1", "1"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["fc1.weight / 5", "fc2.weight / 9"]


def test_time_that_no_phase_accounts_for_is_shown_too() -> None:
    shown = {axes.get_title(loc="left"): axes.texts[0].get_text() for axes in plot_seconds(run()).axes}
    assert shown == {"stage 1": "6", "merge": "3", "other": "1", "total": "10"}


@pytest.mark.parametrize("plot", ALL)
def test_a_name_is_text_whatever_it_says(plot: Callable[[Any], Figure]) -> None:
    names = ["$\\frac$", "a_$x$", "<script>&\"'", "名\x00\ud800", "m" * 300]
    runs = [run(name, ranks=[{name: [1, 2]}] * 3, seconds={name: 1.0, "total": 2.0}) for name in names]
    assert b"<script" not in picture(plot(runs), "svg")


def test_colours_follow_the_method() -> None:
    groups = groups_of([plain("gpm"), run()])
    alone = plot_alpha(groups).axes[0].lines[0].get_color()
    assert alone == plot_path(groups).axes[0].lines[0].get_color() == groups[1].colour != groups[0].colour


def test_runs_that_cannot_be_shown_together_are_refused() -> None:
    with pytest.raises(BecameError, match=r"2 tasks of split-mnist.*3 of split-mnist"):
        groups_of([run(), run("gpm", tasks=2)])
    with pytest.raises(BecameError, match="twice"):
        groups_of([run(), run()])
    with pytest.raises(BecameError, match="no finished runs"):
        groups_of([])


def test_configurations_of_one_method_are_told_apart_by_what_differs() -> None:
    groups = groups_of([run(), run(config=CONFIG | {"epochs": 9}), plain("gpm")])
    assert [group.label for group in groups] == ["became (epochs 2)", "became (epochs 9)", "gpm"]


def test_without_matplotlib_one_sentence_says_what_to_install() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from adapters.cli.__main__ import main\n"
    code += "for command in ('report', 'compare'): main([command, 'nowhere'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [
        "error: figures need matplotlib; pip install 'became[report]'.",
        "error: nowhere holds no finished runs; give a folder that --out named.",  # a comparison does without
    ]
