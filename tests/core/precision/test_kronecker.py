from typing import Any

import numpy as np
import pytest

from became_core import BecameError
from became_core.laplace import Dense, Kronecker
from reference.precisions import kronecker_matrix
from tests.backends import to_numpy, to_xp

A = np.asarray([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]])
G = np.asarray([[1.0, 0.25], [0.25, 2.0]])


def kronecker(xp: Any, **options: Any) -> Kronecker:
    return Kronecker({"w": (to_xp(xp, A), to_xp(xp, G))}, **options)


def test_inner_is_the_trace_that_defines_it(xp: Any) -> None:
    v = np.asarray([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    assert float(kronecker(xp).inner({"w": to_xp(xp, v)}, {"w": to_xp(xp, v)})) == np.trace(v.T @ G @ v @ A)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1), (2, 1, 3)])
def test_a_direction_may_have_any_shape_that_flattens_to_the_factors(xp: Any, shape: tuple[int, ...]) -> None:
    v = np.arange(6) / 8
    u = {"w": to_xp(xp, v.reshape(shape))}
    matrix = kronecker_matrix(A, G, 0.0)
    assert float(kronecker(xp).inner(u, u)) == v @ matrix @ v
    applied, solved = kronecker(xp).apply(u)["w"], kronecker(xp).solve(u)["w"]
    assert tuple(applied.shape) == tuple(solved.shape) == shape
    np.testing.assert_array_equal(to_numpy(applied).ravel(), matrix @ v)
    np.testing.assert_allclose(to_numpy(solved).ravel(), np.linalg.solve(matrix, v), rtol=0, atol=1e-14)


def test_a_transposed_weight_is_refused(xp: Any) -> None:
    u = {"w": xp.ones((3, 2), dtype=xp.float64)}
    with pytest.raises(
        BecameError, match=r"^u 'w' has shape \(3, 2\) but the precision is for \(2, 3\); make them equal"
    ):
        kronecker(xp).apply(u)


def test_factors_of_one_weight_do_not_add_to_factors(xp: Any) -> None:
    other = Kronecker({"w": (to_xp(xp, G @ G), to_xp(xp, A))}, shapes={"w": (3, 2)})
    with pytest.raises(
        BecameError, match=r"^two precisions of 'w' are for shapes \(2, 3\) and \(3, 2\); make them equal"
    ):
        kronecker(xp) + other
    total = kronecker(xp) + kronecker(xp)
    assert not isinstance(total, Kronecker)
    np.testing.assert_array_equal(to_numpy(Dense.of(total).matrix), 2 * kronecker_matrix(A, G, 0.0))


def test_factors_of_two_weights_stand_side_by_side(xp: Any) -> None:
    other = Kronecker({"v": (to_xp(xp, G), to_xp(xp, A))}).damped(0.5)
    total = kronecker(xp) + other
    assert isinstance(total, Kronecker)
    expected = np.linalg.slogdet(kronecker_matrix(A, G, 0.0))[1] + np.linalg.slogdet(kronecker_matrix(G, A, 0.5))[1]
    assert float(total.log_determinant()) == pytest.approx(expected, rel=1e-13)


def test_damping_adds_up_and_scales_with_the_factors(xp: Any) -> None:
    damped = (kronecker(xp).damped(0.5) * 2).damped(0.25)
    np.testing.assert_array_equal(to_numpy(Dense.of(damped).matrix), 2 * kronecker_matrix(A, G, 0.0) + 1.25 * np.eye(6))


def test_rounding_below_zero_does_not_pass_for_curvature(xp: Any) -> None:
    """Factors of rank one have eigenvalues of -1e-17 or so, whose product is positive; a logarithm would exist."""
    a, g = np.asarray([0.1, 0.7, -0.3]), np.asarray([0.3, 0.9])
    singular = Kronecker({"w": (to_xp(xp, np.outer(a, a)), to_xp(xp, np.outer(g, g)))})
    with pytest.raises(
        BecameError, match=r"^the precision of 'w' is singular to rounding and has no inverse; add a mul"
    ):
        singular.log_determinant()


def test_what_are_no_factors_is_refused(xp: Any) -> None:
    a, g = to_xp(xp, A), to_xp(xp, G)
    with pytest.raises(BecameError, match=r"^the factor A of 'w' has shape \(2, 3\); it must be a square matrix\.$"):
        Kronecker({"w": (a[:2, :], g)})
    with pytest.raises(BecameError, match=r"^the factor G of 'w' has negative or NaN entries on its diagonal; a curv"):
        Kronecker({"w": (a, -g)})
    with pytest.raises(BecameError, match=r"^the factor A of 'w' is not symmetric; a curvature is\.$"):
        Kronecker({"w": (to_xp(xp, np.triu(A)), g)})
    with pytest.raises(BecameError, match=r"^'v' has a damping or a shape but no factors; give it factors\.$"):
        kronecker(xp, shapes={"v": (2, 3)})
    with pytest.raises(BecameError, match=r"^'w' has shape \(3, 2\) but its factors are for \[2, 3\]\.$"):
        kronecker(xp, shapes={"w": (3, 2)})
    with pytest.raises(BecameError, match=r"^the damping of 'w' is negative or not a number; it must be at least 0\.$"):
        kronecker(xp, damping={"w": xp.asarray(-1.0)})


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_what_is_singular_to_rounding_depends_on_the_largest_eigenvalue(xp: Any, scale: float) -> None:
    def precision(least: float) -> Kronecker:
        return Kronecker({"w": (to_xp(xp, np.diag([1.0, least])), to_xp(xp, np.asarray([[scale]])))})

    assert float(precision(0.5).log_determinant()) == pytest.approx(np.log(0.5) + 2 * np.log(scale), rel=1e-14)
    with pytest.raises(BecameError, match="is singular to rounding"):
        precision(1e-17).log_determinant()
