from typing import Any

import numpy as np
import pytest
from hypothesis import given

from became_core import BecameError, Quadratic, path_quadratic, trace_path
from became_core.laplace import TracedPath, compare
from reference.formulas import laplace_loss
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, segments

ALPHAS = [0.0, 0.25, 0.5, 1.0, 1.5]


@given(segment=segments())
def test_the_trace_of_a_quadratic_loss_is_what_the_quadratic_predicts(xp: Any, segment: Segment) -> None:
    gp, hat, old, new, gradient, mean = segment.dense()
    delta = hat - gp

    def loss(theta: dict[str, Any]) -> float:
        flat = np.concatenate([to_numpy(theta[name]).ravel() for name in sorted(theta)])
        away = flat - hat
        return float(0.5 * (flat - mean) @ old @ (flat - mean) + gradient @ away + 0.5 * away @ new @ away)

    path = trace_path(loss, to_xp(xp, segment.theta_gp), to_xp(xp, segment.theta_hat), ALPHAS)
    traced = path.values
    np.testing.assert_allclose(traced, [laplace_loss(alpha, *segment.dense()) for alpha in ALPHAS], rtol=1e-13)
    trees = (segment.theta_gp, segment.theta_hat, segment.fisher_old, segment.fisher_new)
    quadratic = path_quadratic(
        *(to_xp(xp, tree) for tree in trees), gradient=to_xp(xp, segment.gradient), mean=to_xp(xp, segment.mean)
    )
    scale = 1 + float(np.abs(traced).max()) + float(delta @ delta)
    if scale > 1 + 1e-3:
        report = compare(quadratic, TracedPath(ALPHAS[:4], traced[:4]))
        assert report.r_squared == pytest.approx(1, abs=1e-9)
        assert report.convexity_violations == ()
        slopes = [float(quadratic.slope_at(alpha)[0]) for alpha in (0.0, 1.0)]
        np.testing.assert_allclose(report.true_slopes, slopes, atol=1e-9)
        np.testing.assert_allclose(report.predicted_slopes, slopes, atol=1e-12)
        assert report.regret <= 1e-9 * scale  # no traced point is lower than the predicted minimum
        assert report.plasticity_predicted == bool(quadratic.has_interior_optimum)
    predicted = [traced[0] + float(quadratic.value(alpha)) for alpha in ALPHAS]
    np.testing.assert_allclose(predicted, traced, atol=1e-13 * scale, rtol=0)


def test_the_ends_are_the_models_themselves(xp: Any) -> None:
    stable, plastic = xp.asarray([0.1, 0.7]), xp.asarray([0.3, 0.2])
    (first, last) = trace_path(lambda theta: theta, stable, plastic, [0.0, 1.0]).values
    assert bool(xp.all(first == stable))
    assert bool(xp.all(last == plastic))


def test_a_report_by_hand(xp: Any) -> None:
    """The truth is |alpha - 0.75| + 1, with a bump; the prediction has its minimum at 0.25."""
    quadratic = Quadratic(xp.asarray([-1.0]), xp.asarray([[4.0]]))
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
    report = compare(quadratic, TracedPath(alphas, [1.75, 1.7, 1.25, xp.asarray(1.0), 1.25]))
    assert report.predicted_minimiser == 0.25
    assert report.true_minimiser == 0.75
    assert report.regret == pytest.approx(0.7)
    assert report.convexity_violations == (0.25,)
    assert report.predicted_slopes == (-1.0, 3.0)
    assert report.true_slopes[1] == pytest.approx(2.0)  # of the parabola through the last three
    assert report.plasticity_predicted
    assert report.plasticity_holds
    truth, predicted = np.asarray([1.75, 1.7, 1.25, 1.0, 1.25]), np.asarray([0.0, -0.125, 0.0, 0.375, 1.0])
    error = (truth - truth.mean()) - (predicted - predicted.mean())
    assert report.r_squared == pytest.approx(1 - np.sum(error**2) / np.sum((truth - truth.mean()) ** 2))


def test_the_truth_at_the_prediction_lies_on_the_parabola_nearest_to_it(xp: Any) -> None:
    """The truth is 3 (alpha - 0.9)^2; the prediction's minimum, 0.7, was not traced."""
    quadratic = Quadratic(xp.asarray([-1.4]), xp.asarray([[2.0]]))
    alphas = np.asarray([0.0, 0.25, 0.5, 0.75, 1.0])
    report = compare(quadratic, TracedPath(alphas.tolist(), (3 * (alphas - 0.9) ** 2).tolist()))
    assert report.regret == pytest.approx(3 * 0.2**2 - 3 * 0.1**2)


@pytest.mark.parametrize(("rise", "violations"), [(-1.0, ()), (0.0, ()), (3e-6, ()), (5e-6, (1.5,)), (1.0, (1.5,))])
def test_a_point_above_the_chord_of_its_neighbours_is_a_violation(
    xp: Any, rise: float, violations: tuple[float, ...]
) -> None:
    """Points unevenly spaced on a line, the middle one lifted; a millionth of the largest loss, 4, is rounding."""
    quadratic = Quadratic(xp.asarray([-1.0]), xp.asarray([[4.0]]))
    assert compare(quadratic, TracedPath([1.0, 1.5, 3.0], [4.0, 3.5 + rise, 2.0])).convexity_violations == violations


def test_a_flat_or_falling_truth_has_no_interior_optimum(xp: Any) -> None:
    quadratic = Quadratic(xp.asarray([-2.0]), xp.asarray([[1.0]]))
    report = compare(quadratic, TracedPath([0.0, 0.5, 1.0], [3.0, 2.0, 1.0]))
    assert not report.plasticity_predicted
    assert not report.plasticity_holds
    assert report.predicted_minimiser == report.true_minimiser == 1
    assert compare(quadratic * 0, TracedPath([0.0, 0.5, 1.0], [1.0, 1.0, 1.0])).r_squared == 1


def test_paths_that_cannot_be_compared(xp: Any) -> None:
    quadratic = Quadratic(xp.asarray([-1.0]), xp.asarray([[4.0]]))
    with pytest.raises(BecameError, match="three or more points in ascending order"):
        compare(quadratic, TracedPath([0.0, 1.0], [1.0, 2.0]))
    with pytest.raises(BecameError, match="three or more points in ascending order"):
        compare(quadratic, TracedPath([0.0, 1.0, 0.5], [1.0, 2.0, 2.0]))
    with pytest.raises(BecameError, match="a path has one direction; the quadratic has 2"):
        compare(Quadratic(xp.zeros((2,)), xp.zeros((2, 2))), TracedPath([0.0, 0.5, 1.0], [1.0] * 3))
    with pytest.raises(BecameError, match=r"the loss at alpha = 0\.5 is nan; it must be finite"):
        compare(quadratic, TracedPath([0.0, 0.5, 1.0], [1.0, xp.asarray(float("nan")), 1.0]))
