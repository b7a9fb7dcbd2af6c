"""The path report: regrets by hand, and the tables of a small run."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.analysis import path_report
from adapters.analysis.bootstrap import Estimate
from adapters.analysis.figures.training import plot_path
from adapters.analysis.path_report import calibration_table, curve_table, path_table, regret, regret_table, write_paths
from adapters.cli.__main__ import main as became
from adapters.cli.main import main
from adapters.runs import read_results
from adapters.torch.run import BACKEND
from became_core import BecameError
from tests.analysis.runs import path, run

PATHS = [
    {
        "points": [
            {"alpha": 0.0, "loss": 3.0, "accuracy": 60.0},
            {"alpha": 0.5, "loss": 1.0, "accuracy": 70.0},
            {"alpha": 1.0, "loss": 2.0, "accuracy": 64.0},
        ]
    },
    {
        "points": [
            {"alpha": 0.0, "loss": 1.0, "accuracy": 50.0},
            {"alpha": 0.5, "loss": 2.0, "accuracy": 52.0},
            {"alpha": 1.0, "loss": 3.0, "accuracy": 48.0},
        ]
    },
]


@pytest.mark.parametrize(
    ("alphas", "points", "loss"), [((0.25, 0.5), 2.5, 1.0), ((1.0, 0.75), 4.0, 1.25), ((0.5, 0.0), 1.0, 0.0)]
)
def test_a_regret_is_how_far_the_best_point_is(alphas: tuple[float, float], points: float, loss: float) -> None:
    assert regret(PATHS, alphas, "accuracy") == pytest.approx(points)
    assert regret(PATHS, alphas, "loss") == pytest.approx(loss)


@pytest.mark.parametrize("method", ["became", "imm-mode"])  # which merges by single weights, at no alpha
def test_a_traced_run_ends_with_its_report(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--epochs", "1", "--stage2-epochs", "1", "--curvature-samples", "32", "--batch-size", "64"]
    arguments += ["--first", "2", "--methods", method, "--path-points", "3", "--out", str(tmp_path)]
    assert main(BACKEND, arguments) == 0
    shown = capsys.readouterr().out
    assert "the truth along the merging paths" in shown
    for name in (
        "α=0.5",
        "published, batch",
        "exact, with gradient / diagonal x kappa",
        "secant / exact",
        "grid, by loss",
    ):
        assert name in shown


def test_the_regret_of_each_merge_is_how_far_its_best_traced_point_is() -> None:
    """The parabola of a path has its minimum at 1/2, where the constant 1/2 has no regret, and 0 has a quarter."""
    kinds = ("exact", "exact, with gradient", "secant", "batch", "diagonal", "kronecker", "diagonal, without head")
    sides = {side: {kind: [-1.0, 1.0] for kind in kinds} for side in ("new", "old")}
    traced = run(alpha=[None, 0.25, 0.5], paths=[path() | sides, path() | sides])
    cells = {str(row[0]): row[1:] for row in regret_table(traced, "loss").rows}
    numbers = {name: [cell.values[0] for cell in row if isinstance(cell, Estimate)] for name, row in cells.items()}
    assert numbers["constant 0.5"] == pytest.approx([0.0, 0.0, 0.0])
    assert numbers["constant 0"] == pytest.approx([0.25, 0.25, 0.25])
    assert numbers["the run"] == pytest.approx([0.0625, 0.0, 0.03125])
    by_accuracy = {str(row[0]): row[-1] for row in regret_table(traced, "accuracy").rows}
    assert isinstance(by_accuracy["constant 1"], Estimate)
    assert by_accuracy["constant 1"].values[0] == pytest.approx(1.25)


def test_what_approximations_miss_is_the_truth_over_them() -> None:
    """A slope of an approximation that is zero has no ratio."""
    new = {"exact": [0.0, 6.0], "diagonal": [0.0, 4.0]}
    old = {"exact": [0.5, 8.0], "diagonal": [0.25, 2.0], "kronecker": [0.0, 16.0]}
    traced = run(alpha=[None, 0.25], paths=[path() | {"new": new, "old": old}])
    table = calibration_table(traced)
    assert [column.heading for column in table.columns[1:]] == [
        "κ, of the new task",
        "true curvature / that of the diagonal",
        "true slope / that of the diagonal",
        "true curvature / that of Kronecker factors",
        "true slope / that of Kronecker factors",
    ]
    ((task, *ratios),) = table.rows
    assert task == "2"
    assert [cell.values[0] if isinstance(cell, Estimate) else cell for cell in ratios] == [1.5, 4.0, 2.0, 0.5, None]


def test_what_the_curve_promised_is_held_against_what_it_gave() -> None:
    """The truth at the segment's alpha by diagonals, 1/2 here, minus that at the middle of the curve."""
    kinds = ("exact", "exact, with gradient", "secant", "batch", "diagonal", "kronecker", "diagonal, without head")
    sides = {side: {kind: [-1.0, 1.0] for kind in kinds} for side in ("new", "old")}
    curve = [dict(point, loss=point["loss"] - 0.25 * point["alpha"]) for point in path()["points"]]
    traced = run(alpha=[None, 0.25], paths=[path() | sides | {"curve": curve, "predicted_advantage": 0.5}])
    ((task, predicted, *estimates),) = curve_table(traced).rows
    assert (task, predicted) == ("2", "0.5")
    measured, of_segment, of_curve, *accuracies = (cell.values[0] for cell in estimates if isinstance(cell, Estimate))
    assert measured == pytest.approx(0.125)
    assert of_curve < of_segment
    assert len(accuracies) == 2


def test_a_traced_run_whose_rule_has_no_alpha_is_shown_without_one() -> None:
    """As of imm-mode, and of became with a coefficient for each weight."""
    kinds = ("exact", "exact, with gradient", "secant", "batch", "diagonal", "kronecker", "diagonal, without head")
    sides = {side: {kind: [-1.0, 1.0] for kind in kinds} for side in ("new", "old")}
    traced = run(alpha=[None, None, None], paths=[path() | sides, path() | sides])
    assert [row[0] for row in path_table(traced).rows] == ["2", "", "3", ""]
    assert "the run" not in {row[0] for row in regret_table(traced, "loss").rows}
    assert [axes.get_title("left") for axes in plot_path(traced).axes] == ["into task 2", "", "into task 3", ""]


def test_paths_of_finished_runs_are_tables_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--epochs", "1", "--stage2-epochs", "1", "--curvature-samples", "32", "--batch-size", "64", "--quiet"]
    arguments += ["--first", "2", "--methods", "became", "--path-points", "3", "--out", str(tmp_path / "out")]
    assert main(BACKEND, arguments) == 0
    capsys.readouterr()
    assert became(["paths", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for words in ("the truth along the merging paths", "regret in points of accuracy, merge by merge", "the run"):
        assert words in shown
    assert "the curve beside the segment" in shown
    assert "what the old tasks' approximations miss" in shown
    figure = tmp_path / "out" / "paths-became-seed0.svg"
    assert str(figure) in shown
    assert b"<svg" in figure.read_bytes()[:400]
    folders = [tmp_path / place / "out" for place in "abc"]
    for folder in folders:
        shutil.copytree(tmp_path / "out", folder)
    assert became(["paths", *map(str, folders), "--into", str(tmp_path / "all")]) == 0
    names = {file.name for file in (tmp_path / "all").iterdir()}
    assert names == {f"paths-became-seed0{end}.svg" for end in ("", "-out", "-out-2")}
    foreign = [replace(run, method="../../outside") for run in read_results(tmp_path / "out")]
    monkeypatch.setattr(path_report, "finished_runs", lambda _: foreign)
    _, written = write_paths([tmp_path / "out"])
    assert [file.parent for file in written] == [tmp_path / "out"]


def test_runs_that_traced_nothing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BACKEND, ["--epochs", "1", "--first", "2", "--methods", "finetune", "--out", str(tmp_path)]) == 0
    assert became(["paths", str(tmp_path)]) == 2
    assert "no run in these folders has traced its merging paths; run with --path-points 11" in capsys.readouterr().err


def test_paths_that_lack_a_way_to_measure_a_side_are_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_report, "finished_runs", lambda _: [run()])
    with pytest.raises(BecameError, match=r"the paths of became with seed 0 in .* lack '.*'; trace them with"):
        write_paths([tmp_path])
