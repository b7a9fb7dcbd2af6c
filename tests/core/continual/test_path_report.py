"""The estimators of alpha against brute force on quadratics, and measured on the reference learner."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core.continual import Along, Annealed, Training, alpha_estimates, build_method, learn
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


def test_the_exact_sides_of_a_traced_run_are_derivatives_of_the_true_loss() -> None:
    """Near theta_gp and theta_hat, which are near each other, the exact sides are the traced loss's derivatives."""
    stream = prototype_stream()
    alphas = tuple(np.linspace(0, 1, 5))
    training = Training(Annealed(0.2, 6), Annealed(0.002, 1), batch_size=16, path_alphas=alphas)
    record = learn(ReferenceLearner(stream), stream, build_method("became"), training)
    assert len(record.paths) == len(stream.tasks) - 1
    for path in record.paths:
        losses = np.array([point.loss for point in path.points])
        slope = (-25 * losses[0] + 48 * losses[1] - 36 * losses[2] + 16 * losses[3] - 3 * losses[4]) / (12 * 0.25)
        new, old = {name: Along(*side) for name, side in path.new.items()}, path.old
        assert set(new) == set(NEW)
        assert set(old) == set(OLD)
        assert new["secant"].slope + old["exact"][0] == pytest.approx(slope, rel=2e-3)
        assert new["exact, with gradient"].slope == pytest.approx(new["secant"].slope, rel=0.05)
        assert new["exact, with gradient"].curvature == new["exact"].curvature > 0
        assert new["diagonal, without head"].curvature < new["diagonal"].curvature
        assert all(side.curvature >= 0 for side in new.values())
        assert new["fall"].slope == -new["fall"].curvature
