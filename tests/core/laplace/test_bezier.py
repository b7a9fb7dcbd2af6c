"""The curved path: where it passes, when it beats the segment, and that training its control point goes downhill."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from became_core import BecameError, optimal_alpha
from became_core.laplace import BezierPath, bezier_path, merge, predicted_advantage, train_control
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, segments


def trees_of(xp: Any, segment: Segment) -> tuple[Any, ...]:
    return tuple(
        to_xp(xp, tree) for tree in (segment.theta_gp, segment.theta_hat, segment.fisher_old, segment.fisher_new)
    )


def cumulative(segment: Segment, theta: Any) -> float:
    total = 0.0
    for name, value in theta.items():
        w = to_numpy(value)
        total += float(np.sum(segment.fisher_old[name] * (w - segment.theta_gp[name]) ** 2)) / 2
        total += float(np.sum(segment.fisher_new[name] * (w - segment.theta_hat[name]) ** 2)) / 2
    return total


@given(segment=segments())
def test_the_curve_passes_through_both_models_and_the_minimum(xp: Any, segment: Segment) -> None:
    path = bezier_path(*trees_of(xp, segment))
    for name in segment.theta_gp:
        np.testing.assert_allclose(to_numpy(path.at(0.0)[name]), segment.theta_gp[name], atol=1e-12)
        np.testing.assert_allclose(to_numpy(path.at(1.0)[name]), segment.theta_hat[name], atol=1e-12)
    middle = cumulative(segment, path.at(0.5))
    draw = np.random.default_rng(0)
    for _ in range(5):  # nothing near it is better
        shaken = {n: to_numpy(v) + 0.1 * draw.normal(size=v.shape) for n, v in path.at(0.5).items()}
        assert middle <= cumulative(segment, shaken) + 1e-12


@given(segment=segments())
def test_the_advantage_is_that_over_the_best_of_the_segment(xp: Any, segment: Segment) -> None:
    trees = trees_of(xp, segment)
    advantage = float(predicted_advantage(*trees))
    best = merge(trees[0], trees[1], optimal_alpha(*trees))
    found = cumulative(segment, best) - cumulative(segment, bezier_path(*trees).at(0.5))
    assert advantage == pytest.approx(found, abs=1e-10)
    assert advantage >= -1e-12


@given(segment=segments(), share=st.sampled_from([0.0, 1.0, 3.0]))
def test_there_is_none_where_one_alpha_serves_every_weight(xp: Any, segment: Segment, share: float) -> None:
    assume(segment.curvature > 0)
    gp, hat, old, _ = trees_of(xp, segment)
    new = {name: share * value for name, value in old.items()}
    assert float(predicted_advantage(gp, hat, old, new)) == pytest.approx(0, abs=1e-11)


def test_a_step_of_the_control_point_is_the_mean_over_the_nodes(xp: Any) -> None:
    """On a slope that is 1 everywhere, each of the nodes at 1/4, 1/2, 3/4 pulls by 2 t (1 - t)."""
    straight = BezierPath(xp.asarray([0.0]), xp.asarray([1.0]), xp.asarray([2.0]))
    moved = train_control(straight, lambda theta: theta * 0 + 1, rate=0.3, steps=2, nodes=3)
    assert float(moved.control[0]) == pytest.approx(1 - 2 * 0.3 * (0.375 + 0.5 + 0.375) / 3)


def test_a_trained_control_point_goes_downhill(xp: Any) -> None:
    """From the segment, with gradients of the cumulative loss, the curve's mean loss falls below the segment's."""
    draw = np.random.default_rng(1)
    gp, hat = ({"w": draw.normal(size=6)} for _ in range(2))
    old, new = ({"w": draw.uniform(0, 2, size=6)} for _ in range(2))
    segment = Segment(gp, hat, old, new, gp, gp)
    start, _, stiff_old, stiff_new = trees_of(xp, segment)
    end = to_xp(xp, hat)

    def gradient(theta: Any) -> Any:
        w = theta["w"]
        return {"w": stiff_old["w"] * (w - start["w"]) + stiff_new["w"] * (w - end["w"])}

    def mean_loss(path: BezierPath) -> float:
        return float(np.mean([cumulative(segment, path.at(t)) for t in (0.25, 0.5, 0.75)]))

    straight = BezierPath(start, merge(start, end, 0.5), end)
    bent = train_control(straight, gradient, rate=0.5, steps=100)
    assert mean_loss(bent) < mean_loss(straight) - 0.05
    assert mean_loss(train_control(bent, gradient, rate=0.5, steps=100)) == pytest.approx(mean_loss(bent), abs=1e-3)
    assert to_numpy(straight.control["w"]).tolist() == to_numpy(merge(start, end, 0.5)["w"]).tolist()  # unchanged
    with pytest.raises(BecameError, match="trained in 0 steps"):
        train_control(straight, gradient, rate=0.5, steps=0)
