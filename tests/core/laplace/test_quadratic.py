from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError, Quadratic, path_quadratic
from became_core.arrays import namespace
from reference.formulas import laplace_loss
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, segments

EIGHTHS = st.integers(-64, 64).map(lambda value: value / 8)
ALPHAS = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5])


def quadratic_of(xp: Any, segment: Segment) -> Quadratic:
    return path_quadratic(
        to_xp(xp, segment.theta_gp),
        to_xp(xp, segment.theta_hat),
        to_xp(xp, segment.fisher_old),
        to_xp(xp, segment.fisher_new),
        gradient=to_xp(xp, segment.gradient),
        mean=to_xp(xp, segment.mean),
    )


def of_numbers(xp: Any, slope: float, curvature: float) -> Quadratic:
    return Quadratic(xp.asarray(slope, dtype=xp.float64), xp.asarray(curvature, dtype=xp.float64))


@given(segment=segments(), alpha=ALPHAS)
def test_it_is_the_objective_up_to_a_constant(xp: Any, segment: Segment, alpha: float) -> None:
    quadratic = quadratic_of(xp, segment)
    expected = laplace_loss(alpha, *segment.dense()) - laplace_loss(0.0, *segment.dense())
    assert float(quadratic.value(alpha)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(segment=segments(), alpha=ALPHAS)
def test_its_slope_is_the_derivative(xp: Any, segment: Segment, alpha: float) -> None:
    quadratic, step = quadratic_of(xp, segment), 0.5  # a central difference is exact for a quadratic
    difference = float(quadratic.value(alpha + step) - quadratic.value(alpha - step)) / (2 * step)
    assert float(quadratic.slope_at(alpha)) == pytest.approx(difference, rel=1e-12, abs=1e-12)


@given(segment=segments())
def test_quadratics_add_over_leaves(xp: Any, segment: Segment) -> None:
    trees = (
        segment.theta_gp,
        segment.theta_hat,
        segment.fisher_old,
        segment.fisher_new,
        segment.gradient,
        segment.mean,
    )
    parts = [quadratic_of(xp, Segment(*({name: tree[name]} for tree in trees))) for name in segment.theta_gp]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    whole = quadratic_of(xp, segment)
    assert float(total.slope) == float(whole.slope)
    assert float(total.curvature) == float(whole.curvature)


@given(segment=segments())
def test_quadratics_add_over_losses(xp: Any, segment: Segment) -> None:
    zero = {name: np.zeros_like(value) for name, value in segment.theta_gp.items()}
    s = segment
    old = quadratic_of(xp, Segment(s.theta_gp, s.theta_hat, s.fisher_old, zero, zero, s.mean))
    new = quadratic_of(xp, Segment(s.theta_gp, s.theta_hat, zero, s.fisher_new, s.gradient, s.mean))
    assert float((old + new).slope) == float(quadratic_of(xp, s).slope)
    assert float((old + new).curvature) == float(quadratic_of(xp, s).curvature)


@given(segment=segments())
def test_positive_semi_definite_curvatures_make_it_convex(xp: Any, segment: Segment) -> None:
    assert bool(quadratic_of(xp, segment).is_convex)


@given(slope=EIGHTHS, curvature=EIGHTHS)
def test_the_clipped_minimiser_is_the_best_of_the_interval(xp: Any, slope: float, curvature: float) -> None:
    quadratic = of_numbers(xp, slope, curvature)
    alpha = float(quadratic.minimiser())
    assert 0 <= alpha <= 1
    grid = np.linspace(0, 1, 129)
    assert float(quadratic.value(alpha)) <= np.min(slope * grid + curvature * grid**2 / 2) + 1e-12


@given(slope=EIGHTHS, curvature=EIGHTHS.filter(lambda value: value != 0))
def test_the_free_minimiser_is_stationary(xp: Any, slope: float, curvature: float) -> None:
    quadratic = of_numbers(xp, slope, curvature)
    assert float(quadratic.slope_at(quadratic.minimiser(clip=False))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("slope", "curvature", "expected"),
    [
        (0.0, 0.0, 0.0),  # any alpha is optimal: the stable model
        (0.0, 2.0, 0.0),
        (1.0, 2.0, 0.0),  # uphill from the start
        (-1.0, 2.0, 0.5),
        (-2.0, 2.0, 1.0),
        (-3.0, 2.0, 1.0),  # downhill to the end
        (-1.0, 0.0, 1.0),  # linear
        (1.0, 0.0, 0.0),
        (-1.0, -2.0, 1.0),  # concave: the better end
        (2.0, -2.0, 0.0),
        (1.0, -2.0, 0.0),  # concave, ends equal
        (0.5, -2.0, 1.0),
    ],
)
def test_degenerate_cases(xp: Any, slope: float, curvature: float, expected: float) -> None:
    assert float(of_numbers(xp, slope, curvature).minimiser()) == expected


def test_without_curvature_the_free_minimiser_is_the_stable_model(xp: Any) -> None:
    assert float(of_numbers(xp, -1.0, 0.0).minimiser(clip=False)) == 0.0


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("slope", "curvature"), [(np.nan, 1.0), (np.nan, np.nan), (-1.0, np.nan)])
def test_what_is_not_a_number_is_not_hidden(xp: Any, slope: float, curvature: float, clip: bool) -> None:
    assert np.isnan(float(of_numbers(xp, slope, curvature).minimiser(clip=clip)))


@given(slope=EIGHTHS, curvature=EIGHTHS)
def test_slopes_of_opposite_sign_put_the_optimum_inside(xp: Any, slope: float, curvature: float) -> None:
    quadratic = of_numbers(xp, slope, curvature)
    alpha = float(quadratic.minimiser())
    inside = bool(quadratic.has_interior_optimum)
    assert inside == (slope < 0 < slope + curvature)
    if inside:
        assert 0 < alpha < 1
        assert float(quadratic.value(alpha)) < min(0.0, float(quadratic.value(1.0)))


@given(slope=EIGHTHS, curvature=EIGHTHS, factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_a_positive_factor_leaves_the_minimiser(xp: Any, slope: float, curvature: float, factor: float) -> None:
    quadratic = of_numbers(xp, slope, curvature)
    scaled = quadratic * xp.asarray(factor, dtype=xp.float64)
    assert float(scaled.minimiser()) == float(quadratic.minimiser())
    assert float(scaled.value(0.5)) == factor * float(quadratic.value(0.5))


def test_results_are_0d_arrays_of_the_backend(xp: Any) -> None:
    array = xp.ones((3,), dtype=xp.float32)
    quadratic = path_quadratic(array, 2 * array, array, array)
    for result in (quadratic.slope, quadratic.curvature, quadratic.minimiser()):
        assert namespace(result=result, array=array)
        assert tuple(result.shape) == ()
        assert result.dtype == xp.float32
    assert to_numpy(quadratic.slope) == -3


def test_a_tree_without_arrays_is_refused() -> None:
    with pytest.raises(BecameError, match=r"^theta_gp has no arrays; give at least one\.$"):
        path_quadratic({}, {}, {}, {})
