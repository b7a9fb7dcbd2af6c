"""The curved path: where it passes, its minimum, when it beats the segment, and that training it goes downhill."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from became_core import BecameError, Quadratic, optimal_alpha
from became_core.laplace import (
    Became,
    BecameCurve,
    BezierPath,
    Diagonal,
    DiagonalFisher,
    LaplacePosterior,
    ModeIMM,
    bezier_path,
    curve_minimiser,
    merge,
    predicted_advantage,
    train_control,
)
from reference.curves import curve_point, least_along_curve, posterior_mode
from tests.backends import to_numpy, to_xp
from tests.compilers import gradient_of
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


@given(segment=segments(), t=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_points_of_the_curve_are_those_of_the_formula(xp: Any, segment: Segment, t: float) -> None:
    """Around the mode by a dense solve, with the two ends to the bit."""
    path = bezier_path(*trees_of(xp, segment))
    at_number, at_array = path.at(t), path.at(xp.asarray(t, dtype=xp.float64))
    for name, gp in segment.theta_gp.items():
        hat, old, new = (np.ravel(tree[name]) for tree in (segment.theta_hat, segment.fisher_old, segment.fisher_new))
        curved = (old + new) > 0
        mode = 0.5 * (np.ravel(gp) + hat)
        diagonals = np.diag(old[curved]), np.diag(new[curved])
        mode[curved] = posterior_mode(np.ravel(gp)[curved], hat[curved], *diagonals)
        control = 2 * mode - 0.5 * (np.ravel(gp) + hat)
        expected = curve_point(np.ravel(gp), control, hat, t)
        np.testing.assert_allclose(np.ravel(to_numpy(at_number[name])), expected, atol=1e-12)
        np.testing.assert_allclose(to_numpy(at_array[name]), to_numpy(at_number[name]), rtol=1e-15)
        if t in (0.0, 1.0):
            assert to_numpy(at_number[name]).tolist() == (segment.theta_hat[name] if t else gp).tolist()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_advantage_of_half_precision_is_summed_in_single(xp: Any, name: str) -> None:
    if not hasattr(xp, name):
        pytest.skip(f"this backend has no {name}")
    half = getattr(xp, name)
    stable, pair = xp.zeros((200_000,), dtype=half), np.tile([1.0, 3.0], 100_000)
    fishers = (xp.astype(to_xp(xp, each), half) for each in (pair, pair[::-1]))
    found = predicted_advantage(stable, xp.ones_like(stable), *fishers)
    assert found.dtype == xp.float32
    assert float(found) == 25_000  # each weight has 1/8


COEFFICIENTS = st.one_of(st.sampled_from([0.0, 1e-9, -1e-9]), st.floats(-4, 4).filter(lambda x: abs(x) > 1e-6))


@given(slope=st.tuples(COEFFICIENTS, COEFFICIENTS), curvature=st.tuples(COEFFICIENTS, COEFFICIENTS, COEFFICIENTS))
def test_the_minimum_along_a_curve_is_that_of_a_fine_grid(xp: Any, slope: Any, curvature: Any) -> None:
    """Convex or not, with one stationary point or three, and where the curve hardly bends."""
    b, c = np.asarray(slope), np.asarray([[curvature[0], curvature[1]], [curvature[1], curvature[2]]])
    t = curve_minimiser(Quadratic(to_xp(xp, b), to_xp(xp, c)))
    assert t.shape == ()
    a = np.array([float(t), 2 * float(t) * (1 - float(t))])
    assert 0 <= float(t) <= 1
    assert float(b @ a + 0.5 * a @ c @ a) <= least_along_curve(b, c) + 1e-12


@pytest.mark.parametrize("stiff", [0.0, 1e-13, 1e-9, 1e-5, 1e-2])
def test_a_curve_that_hardly_bends_has_the_minimum_of_the_segment(xp: Any, stiff: float) -> None:
    """However small the cubic's first coefficient is beside the others, no digit is lost."""
    quadratic = Quadratic(to_xp(xp, np.array([-1.0, 0.0])), to_xp(xp, np.diag([4.0, stiff])))
    t = float(curve_minimiser(quadratic))
    slope = -1 + 4 * t + stiff * (4 * t - 12 * t**2 + 8 * t**3)
    assert slope == pytest.approx(0, abs=1e-15)
    assert t == pytest.approx(0.25, abs=stiff + 1e-15)


def test_the_derivative_of_the_minimum_along_a_curve_is_that_by_differences(xp: Any, backend: str) -> None:
    """With one root or three, on a curve that does not bend, and at an end, where it is 0."""
    problems = [([-1.0, 0.0], np.diag([4.0, 0.0])), ([1.0, 0.0], np.diag([1.0, 1.0])), ([-1.0, 0.0], np.zeros((2, 2)))]
    draw = np.random.default_rng(0)
    for _ in range(8):
        factor = draw.normal(size=(2, 2))
        problems.append((draw.normal(size=2).tolist(), factor @ factor.T))
    for slope, curvature in problems:

        def minimiser(b: Any, curvature: Any = curvature) -> Any:
            return curve_minimiser(Quadratic(b, to_xp(xp, curvature)))

        found = to_numpy(gradient_of(backend, minimiser)(to_xp(xp, np.array(slope))))
        steps = [to_xp(xp, np.array(slope) + sign * unit) for unit in 1e-6 * np.eye(2) for sign in (1, -1)]
        ahead, behind, above, below = (float(minimiser(step)) for step in steps)
        np.testing.assert_allclose(found, [(ahead - behind) / 2e-6, (above - below) / 2e-6], rtol=1e-4, atol=1e-6)


def test_a_constant_loss_keeps_the_stable_model_and_what_is_no_loss_is_refused(xp: Any) -> None:
    zero = Quadratic(xp.asarray([0.0, 0.0]), xp.asarray([[0.0, 0.0], [0.0, 0.0]]))
    assert float(curve_minimiser(zero)) == 0
    with pytest.raises(BecameError, match="a curve lies in a plane of two directions; the quadratic has 1"):
        curve_minimiser(Quadratic(zero.slope[:1], zero.curvature[:1, :1]))
    with pytest.raises(BecameError, match="the loss along a curve has NaN or infinite entries"):
        curve_minimiser(Quadratic(zero.slope + xp.nan, zero.curvature))


@given(segment=segments())
def test_the_rule_finds_the_mode_and_weights_shrink_to_the_segment(xp: Any, segment: Segment) -> None:
    """Of two diagonal losses, each known at its own model, by both rules; half the way back is half of both."""
    assume(segment.curvature > 0)
    gp, hat, old, new = trees_of(xp, segment)
    losses = [LaplacePosterior(gp, Diagonal(old)), LaplacePosterior(hat, Diagonal(new))]
    curved = BecameCurve(DiagonalFisher()).merge([gp, hat], losses)
    mode = ModeIMM().merge([gp, hat], losses).theta
    best, segment_best = cumulative(segment, mode), Became().merge([gp, hat], losses).theta
    assert cumulative(segment, curved.theta) == pytest.approx(best, abs=1e-10)
    by_weight = Became(per="weight").merge([gp, hat], losses)
    halfway = Became(per="weight", shrinkage=0.5).merge([gp, hat], losses).theta
    whole = Became(per="weight", shrinkage=1.0).merge([gp, hat], losses).theta
    assert by_weight.alpha is None
    for name in segment.theta_gp:
        assert to_numpy(by_weight.theta[name]).tolist() == to_numpy(mode[name]).tolist()
        between = 0.5 * (to_numpy(mode[name]) + to_numpy(segment_best[name]))
        np.testing.assert_allclose(to_numpy(halfway[name]), between, atol=1e-12)
        assert to_numpy(whole[name]).tolist() == to_numpy(segment_best[name]).tolist()


def test_rules_refuse_what_they_are_not_for(xp: Any) -> None:
    model = {"w": xp.asarray([1.0])}
    loss = LaplacePosterior(model, Diagonal(model))
    with pytest.raises(BecameError, match="a curve is for two models, not 3"):
        BecameCurve().merge([model] * 3, [loss] * 3)
    with pytest.raises(BecameError, match=r"the shrinkage is 1\.5; it must be in \[0, 1\]"):
        Became(per="weight", shrinkage=1.5)


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
