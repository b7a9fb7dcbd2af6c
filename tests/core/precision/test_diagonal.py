from typing import Any

import numpy as np
import pytest
from hypothesis import given

from became_core import BecameError
from became_core.laplace import Dense, Diagonal, Isotropic
from tests.backends import to_numpy, to_xp
from tests.strategies import Segment, segments


@given(segment=segments())
def test_inner_is_the_dense_product(xp: Any, segment: Segment) -> None:
    gp, hat, old, _, _, _ = segment.dense()
    precision = Diagonal(to_xp(xp, segment.fisher_old))
    left, right = to_xp(xp, segment.theta_gp), to_xp(xp, segment.theta_hat)
    assert float(precision.inner(left, right)) == gp @ old @ hat
    assert float(precision.inner(right, left)) == gp @ old @ hat


@given(segment=segments())
def test_precisions_add_and_scale(xp: Any, segment: Segment) -> None:
    old, new = Diagonal(to_xp(xp, segment.fisher_old)), Diagonal(to_xp(xp, segment.fisher_new))
    delta = to_xp(xp, segment.theta_gp)
    assert float((old + new).inner(delta, delta)) == float(old.inner(delta, delta)) + float(new.inner(delta, delta))
    assert float((old * 0.5).inner(delta, delta)) == 0.5 * float(old.inner(delta, delta))


@given(segment=segments())
def test_apply_is_the_product_with_a_vector(xp: Any, segment: Segment) -> None:
    applied = Diagonal(to_xp(xp, segment.fisher_old)).apply(to_xp(xp, segment.theta_gp))
    for name, value in segment.theta_gp.items():
        np.testing.assert_array_equal(to_numpy(applied[name]), segment.fisher_old[name] * value)


def test_a_parameter_that_one_side_lacks_keeps_the_others_values(xp: Any) -> None:
    total = Diagonal({"a": xp.asarray([1.0])}) + Diagonal({"a": xp.asarray([2.0]), "b": xp.asarray([3.0])})
    assert {name: float(value[0]) for name, value in total.diagonal().items()} == {"a": 3.0, "b": 3.0}


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_what_is_no_precision_is_refused(xp: Any, value: float) -> None:
    with pytest.raises(BecameError, match=r"^the precision of 'w' has negative or NaN entries; .* at least 0\.$"):
        Diagonal({"w": xp.asarray([1.0, value])})


def test_a_direction_of_other_parameters_is_refused(xp: Any) -> None:
    precision = Diagonal({"a": xp.ones((2,)), "b": xp.ones((2,))})
    one, both = {"a": xp.ones((2,))}, {"a": xp.ones((2,)), "b": xp.ones((2,))}
    with pytest.raises(
        BecameError, match=r"^left direction 0 lacks 'b', which the precision covers; give all that it covers\.$"
    ):
        precision.inner(one, both)
    with pytest.raises(
        BecameError, match=r"^right direction 1 'b' has shape \(3,\) but the precision is for \(2,\); make"
    ):
        precision.gram([both], [both, {**both, "b": xp.ones((3,))}])
    with pytest.raises(BecameError, match=r"^there are no left directions; give at least one\.$"):
        precision.gram([])
    with pytest.raises(BecameError, match=r"^the precision has no parameters; give at least one\.$"):
        Diagonal({}).inner({}, {})


def test_isotropic_is_a_multiple_of_the_identity(xp: Any) -> None:
    parameters = {"w": xp.zeros((2, 3), dtype=xp.float32), "b": xp.zeros((), dtype=xp.float32)}
    precision = Isotropic.over(parameters, 0.5)
    np.testing.assert_array_equal(to_numpy(Dense.of(precision).matrix), 0.5 * np.eye(7))
    assert Dense.of(precision).matrix.dtype == xp.float32
    total = precision + Isotropic.over({"b": parameters["b"]}, 1.0)
    assert isinstance(total, Isotropic)
    np.testing.assert_array_equal(to_numpy(Dense.of(total).matrix), np.diag([1.5] + 6 * [0.5]))


def test_what_is_no_multiple_of_the_identity_is_refused(xp: Any) -> None:
    with pytest.raises(BecameError, match=r"^the precision is -1\.0; it must be at least 0\.$"):
        Isotropic.over({"w": xp.zeros((2,))}, -1.0)
    with pytest.raises(
        BecameError, match=r"^the precision of 'w' is negative or not a number; it must be at least 0\.$"
    ):
        Isotropic({"w": xp.asarray(float("nan"))}, {"w": (2,)})
    with pytest.raises(BecameError, match=r"^'v' has an amount or a shape, but not both; give it both\.$"):
        Isotropic({"w": xp.asarray(1.0)}, {"w": (2,), "v": (2,)})
