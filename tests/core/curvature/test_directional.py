from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.curvature import Pushforward, derivatives_along, log_softmax
from reference.formulas import cross_entropy, directional_derivatives, softmax
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths

SAMPLES, CLASSES, WIDTH = 5, 3, 4
PROBLEMS = st.tuples(
    eighths((SAMPLES, CLASSES)),
    eighths((SAMPLES, CLASSES, WIDTH)),
    eighths((WIDTH,)),
    st.lists(st.integers(0, CLASSES - 1), min_size=SAMPLES, max_size=SAMPLES).map(np.asarray),
)


def batches_of(xp: Any, problem: Any, *cuts: int) -> Any:
    """The batches along two directions, delta and its double turned around."""
    logits, jacobians, delta, labels = problem
    tangents = np.stack([jacobians @ delta, -2 * jacobians @ delta[::-1]])
    parts = zip(np.split(logits, cuts), np.split(tangents, cuts, axis=1), np.split(labels, cuts), strict=True)
    return [Pushforward(*(to_xp(xp, part) for part in batch)) for batch in parts]


@given(problem=PROBLEMS)
@pytest.mark.parametrize("cuts", [(), (2,)])
def test_they_are_those_of_the_explicit_jacobian(xp: Any, cuts: tuple[int, ...], problem: Any) -> None:
    logits, jacobians, delta, labels = problem
    slope, curvature = (to_numpy(found) for found in derivatives_along(batches_of(xp, problem, *cuts)))
    expected = directional_derivatives(logits, jacobians, labels, np.stack([delta, -2 * delta[::-1]]))
    scale = 1e-14 * (1 + np.max(np.abs(jacobians)) * np.abs(delta).sum()) ** 2
    np.testing.assert_allclose(slope, expected[0], atol=2 * scale)
    np.testing.assert_allclose(curvature, expected[1], atol=40 * scale)


@given(problem=PROBLEMS)
def test_the_ggn_is_the_curvature_where_logits_are_linear(xp: Any, problem: Any) -> None:
    """Finite differences of the loss itself: no Jacobian and no Hessian of softmax to get wrong twice."""
    logits, jacobians, delta, labels = problem
    tangent = jacobians @ delta
    step = 1e-3 / (1 + np.max(np.abs(tangent)))
    low, middle, high = (cross_entropy(logits + t * tangent, labels) for t in (-step, 0.0, step))
    slope, curvature = (to_numpy(found).ravel()[0] for found in derivatives_along(batches_of(xp, problem)))
    assert float(slope) * step == pytest.approx((high - low) / 2, abs=1e-9)
    assert float(curvature) * step**2 == pytest.approx(high - 2 * middle + low, abs=1e-9)


@given(problem=PROBLEMS)
def test_the_ggn_is_positive_semi_definite(xp: Any, problem: Any) -> None:
    curvature = to_numpy(derivatives_along(batches_of(xp, problem))[1])
    np.testing.assert_array_equal(curvature, curvature.T)
    assert np.linalg.eigvalsh(curvature)[0] >= -1e-13 * np.abs(curvature).max()


@given(logits=eighths((4, 3)), shift=st.sampled_from([0.0, 1e4, -1e4]))
def test_log_softmax_is_stable(xp: Any, logits: Any, shift: float) -> None:
    result = to_numpy(log_softmax(to_xp(xp, logits + shift)))
    np.testing.assert_allclose(result, np.log(softmax(logits)), rtol=1e-12, atol=1e-11)


def test_no_batches_is_an_error() -> None:
    with pytest.raises(BecameError, match=r"^a directional derivative needs at least one sample; none was given\.$"):
        derivatives_along([])
