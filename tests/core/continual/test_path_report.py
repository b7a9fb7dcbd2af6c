"""The estimators of alpha against brute force on quadratics, and measured on the reference learner."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core.arrays import Params
from became_core.continual import Along, Annealed, Training, alpha_estimates, build_method, learn
from became_core.laplace import (
    Became,
    Calibrated,
    Diagonal,
    DiagonalFisher,
    Estimator,
    LaplacePosterior,
    PaperClosedForm,
    Quadratic,
    Secant,
)
from reference.learner import ReferenceLearner
from tests.streams import prototype_stream

SLOPES, CURVATURES = st.floats(-3, 3), st.floats(0.1, 3)
NEW = ("batch", "diagonal", "diagonal, without head", "kronecker", "exact", "exact, with gradient", "secant", "fall")
OLD = ("batch", "diagonal", "kronecker", "exact")


@given(
    new=st.lists(st.builds(Along, SLOPES, CURVATURES), min_size=len(NEW), max_size=len(NEW)),
    old=st.lists(st.builds(Along, SLOPES, CURVATURES), min_size=len(OLD), max_size=len(OLD)),
)
def test_every_estimate_is_the_minimum_of_its_two_sides(new: list[Along], old: list[Along]) -> None:
    new_sides, old_sides = dict(zip(NEW, new, strict=True)), dict(zip(OLD, old, strict=True))
    grid = np.linspace(0, 1, 2001)
    for name, alpha in alpha_estimates(new_sides, old_sides).items():
        at_its_minimum = name.endswith(", at its minimum")
        name = name.removesuffix(", at its minimum")
        if name.startswith("published, "):
            left, right, at_its_minimum = name.removeprefix("published, "), "diagonal", True
            right = "batch" if left == "batch" else right
        else:
            left, right = name.removesuffix(" x kappa").split(" / ")
        kappa = new_sides["exact"].curvature / new_sides[right].curvature if name.endswith(" x kappa") else 1.0
        side = old_sides[right]
        slope = new_sides[left].slope + (0 if at_its_minimum else kappa * side.slope)
        loss = slope * grid + (new_sides[left].curvature + kappa * side.curvature) * grid**2 / 2
        assert alpha == pytest.approx(grid[np.argmin(loss)], abs=6e-4), name


def test_alpha_is_0_if_both_sides_are_flat() -> None:
    new, old = {name: Along(0.0, 0.0) for name in NEW}, {name: Along(0.0, 0.0) for name in OLD}
    assert set(alpha_estimates(new, old).values()) == {0.0}


class NewLoss:
    """A task of one weight, known at 1: its slopes at 0 and at 1, its fall, and two estimates of its curvature at 1."""

    def __init__(self, start: float, end: float, fall: float, exact: float, diagonal: float) -> None:
        self.start, self.end, self.fall, self.exact, self.fisher = start, end, fall, exact, diagonal
        self.mean: Params = {"w": np.ones(1)}

    def diagonal(self) -> Diagonal:
        return Diagonal({"w": np.asarray([self.fisher])})

    def along(self, directions: Sequence[Params]) -> Quadratic:
        ways = np.concatenate([direction["w"] for direction in directions])
        return Quadratic(self.end * ways, self.exact * np.outer(ways, ways))

    def slope(self, origin: Params, directions: Sequence[Params]) -> Any:
        return self.start * np.concatenate([direction["w"] for direction in directions])

    def loss(self, theta: Params) -> float:
        return self.fall * (1 - float(theta["w"][0]))


@given(SLOPES, SLOPES, SLOPES, CURVATURES, st.just(0.0) | CURVATURES, SLOPES, CURVATURES)
def test_estimates_are_those_of_the_estimators(
    start: float, end: float, fall: float, exact: float, fisher: float, mean: float, old: float
) -> None:
    """Also where the new loss bends down between the models, or rises, and where its diagonal is flat."""
    posterior = LaplacePosterior({"w": np.asarray([mean])}, Diagonal({"w": np.asarray([old])}))
    by_fall = Along(-2 * max(fall, 0.0), 2 * max(fall, 0.0))
    new = {name: Along(-fisher, fisher) for name in NEW}
    new |= {"exact": Along(-exact, exact), "exact, with gradient": Along(end - exact, exact), "fall": by_fall}
    new |= {"secant": Along(start, end - start) if end > start else by_fall}
    found = alpha_estimates(new, {name: Along(-old * mean, old) for name in OLD})
    estimators: dict[str, Estimator] = {
        "secant / diagonal x kappa": Secant(),
        "exact, with gradient / diagonal x kappa": Calibrated(),
        "diagonal / diagonal": DiagonalFisher(),
        "published, diagonal": PaperClosedForm(),
    }
    models: tuple[Params, Params] = {"w": np.zeros(1)}, {"w": np.ones(1)}
    for name, estimator in estimators.items():
        alpha: Any = Became(estimator).merge(models, (posterior, NewLoss(start, end, fall, exact, fisher))).alpha
        assert found[name] == pytest.approx(float(alpha), rel=1e-9, abs=1e-12), name


def test_the_exact_sides_of_a_traced_run_are_derivatives_of_the_true_loss() -> None:
    """Near theta_gp and theta_hat, which are near each other, the exact sides are the traced loss's derivatives."""
    stream = prototype_stream()
    alphas = tuple(np.linspace(0, 1, 5))
    training = Training(Annealed(0.2, 6), Annealed(0.002, 1), batch_size=16, path_alphas=alphas)
    record = learn(ReferenceLearner(stream), stream, build_method("became"), training)
    assert len(record.paths) == len(stream.tasks) - 1
    for path, alpha in zip(record.paths, record.alpha[1:], strict=True):
        losses = np.array([point.loss for point in path.points])
        slope = (-25 * losses[0] + 48 * losses[1] - 36 * losses[2] + 16 * losses[3] - 3 * losses[4]) / (12 * 0.25)
        new, old = {name: Along(*side) for name, side in path.new.items()}, path.old
        assert set(new) == set(NEW)
        assert set(old) == set(OLD)
        estimates = alpha_estimates(new, {name: Along(*side) for name, side in old.items()})
        assert estimates["secant / diagonal x kappa"] == pytest.approx(alpha, rel=1e-9)
        assert new["secant"].slope + old["exact"][0] == pytest.approx(slope, rel=2e-3)
        assert new["exact, with gradient"].slope == pytest.approx(new["secant"].slope, rel=0.05)
        assert new["exact, with gradient"].curvature == new["exact"].curvature > 0
        assert new["diagonal, without head"].curvature < new["diagonal"].curvature
        assert all(side.curvature >= 0 for side in new.values())
        assert new["fall"].slope == -new["fall"].curvature


def test_a_posterior_of_another_unit_than_the_new_diagonal_has_no_curve_to_report() -> None:
    stream, training = prototype_stream(), Training(Annealed(0.2, 2), Annealed(0.2, 1), path_alphas=(0.0, 1.0))
    for precision, points in (("exact", 2), ("across", 0)):
        method = build_method("became", {"precision": precision})
        for path in learn(ReferenceLearner(stream), stream, method, training).paths:
            assert (len(path.points), len(path.curve)) == (2, points)
            assert np.isnan(path.predicted_advantage) == (points == 0)
