"""The path report: regrets by hand, and the tables of a small run."""

from pathlib import Path

import pytest

from adapters.analysis.path_report import regret
from adapters.cli.main import main
from adapters.torch.run import BACKEND

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


def test_a_traced_run_ends_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--epochs", "1", "--stage2-epochs", "1", "--curvature-samples", "32", "--batch-size", "64"]
    arguments += ["--first", "2", "--methods", "became", "--path-points", "3", "--out", str(tmp_path)]
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
