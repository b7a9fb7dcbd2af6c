from typing import Any

import numpy as np
import pytest
from hypothesis import given

from became_core.laplace import Diagonal, LaplacePosterior
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, segments


def posterior_of(xp: Any, segment: Segment) -> LaplacePosterior:
    return LaplacePosterior(to_xp(xp, segment.mean), Diagonal(to_xp(xp, segment.fisher_old)))


@given(segment=segments())
def test_loss_is_the_quadratic_form(xp: Any, segment: Segment) -> None:
    gp, _, old, _, _, mean = segment.dense()
    assert float(posterior_of(xp, segment).loss(to_xp(xp, segment.theta_gp))) == 0.5 * (gp - mean) @ old @ (gp - mean)


@given(segment=segments())
def test_gradient_is_that_of_the_loss(xp: Any, segment: Segment) -> None:
    gradient = posterior_of(xp, segment).gradient(to_xp(xp, segment.theta_gp))
    for name, value in segment.theta_gp.items():
        expected = segment.fisher_old[name] * (value - segment.mean[name])
        np.testing.assert_array_equal(to_numpy(gradient[name]), expected)


@given(segment=segments())
def test_gradient_is_for_the_parameters_given(xp: Any, segment: Segment) -> None:
    name = next(iter(segment.theta_gp))
    assert set(posterior_of(xp, segment).gradient(to_xp(xp, {name: segment.theta_gp[name]}))) == {name}


@given(segment=segments())
def test_quadratic_is_the_loss_along_a_direction(xp: Any, segment: Segment) -> None:
    posterior, start = posterior_of(xp, segment), to_xp(xp, segment.theta_gp)
    delta = to_xp(xp, {name: segment.theta_hat[name] - value for name, value in segment.theta_gp.items()})
    quadratic = posterior.quadratic(start, [delta])
    for alpha in (-1.0, 0.5, 1.0):
        there = {name: value + alpha * delta[name] for name, value in start.items()}
        assert float(quadratic.value(alpha)) == float(posterior.loss(there) - posterior.loss(start))


@given(segment=segments())
@pytest.mark.parametrize(("weight", "decay"), [(1.0, 1.0), (1.0, 0.5), (100.0, 1.0)])
def test_update_recentres_and_adds(xp: Any, weight: float, decay: float, segment: Segment) -> None:
    before = posterior_of(xp, segment)
    fisher = Diagonal(to_xp(xp, segment.fisher_new))
    after = before.update(to_xp(xp, segment.theta_hat), fisher, weight=weight, decay=decay)
    for name, value in segment.theta_hat.items():
        np.testing.assert_array_equal(to_numpy(after.mean[name]), value)
        expected = weight * segment.fisher_new[name] + decay * segment.fisher_old[name]
        np.testing.assert_array_equal(to_numpy(after.precision.values[name]), expected)
        np.testing.assert_array_equal(to_numpy(before.precision.values[name]), segment.fisher_old[name])
    assert float(after.loss(to_xp(xp, segment.theta_hat))) == 0
