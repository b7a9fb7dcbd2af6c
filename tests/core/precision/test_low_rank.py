from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from became_core import BecameError
from became_core.laplace import Dense, Diagonal, Isotropic, LowRank
from reference.precisions import low_rank_matrix
from tests.backends import to_numpy, to_xp

U = np.asarray([[1.0, 0.0], [0.5, -1.0], [2.0, 1.0]])  # two columns over w [2] and v [1]


def low_rank(xp: Any, scale: float = 1.0) -> LowRank:
    factors = to_xp(xp, {"w": U[1:], "v": U[:1]})
    ground = Diagonal(to_xp(xp, {"w": np.full(2, 0.5), "v": np.full(1, 0.25)}))
    return LowRank(factors, to_xp(xp, np.asarray([scale, 3.0])), ground)


def test_a_factor_couples_all_parameters(xp: Any) -> None:
    """One gradient over two parameters is no sum of one over each."""
    only_v = to_xp(xp, {"w": np.zeros(2), "v": np.ones(1)})
    np.testing.assert_array_equal(to_numpy(low_rank(xp).apply(only_v)["w"]), [0.5, 2.0])


def test_ranks_add(xp: Any) -> None:
    total = low_rank(xp) + low_rank(xp, 0.5)
    assert isinstance(total, LowRank)
    assert tuple(total.scales.shape) == (4,)
    expected = low_rank_matrix(U, np.asarray([1.5, 6.0]), 2 * np.asarray([0.25, 0.5, 0.5]))
    np.testing.assert_array_equal(to_numpy(Dense.of(total).matrix), expected)


def test_a_diagonal_may_widen_what_is_covered(xp: Any) -> None:
    head = {"head": np.full(2, 2.0)}
    for other in (Diagonal(to_xp(xp, head)), Isotropic.over(to_xp(xp, head), 2.0)):
        total = low_rank(xp) + other
        assert isinstance(total, LowRank)
        expected = np.linalg.slogdet(low_rank_matrix(U, np.asarray([1.0, 3.0]), np.asarray([0.25, 0.5, 0.5])))[1]
        assert float(total.log_determinant()) == pytest.approx(expected + 2 * np.log(2), rel=1e-13)


def test_a_scale_far_above_the_diagonal_keeps_its_accuracy(xp: Any) -> None:
    """More of it than an LU decomposition of the matrix has: that is off by 4e-9 here."""
    matrix = low_rank_matrix(U, np.asarray([1e8, 3.0]), np.asarray([0.25, 0.5, 0.5]))  # to the bit
    (a, b, c), (d, e, f), (g, h, i) = ([Fraction(float(entry)) for entry in row] for row in matrix)
    exact = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    assert float(low_rank(xp, 1e8).log_determinant()) == pytest.approx(np.log(float(exact)), rel=1e-14)


def test_a_diagonal_with_zeros_has_no_woodbury_inverse(xp: Any) -> None:
    bare = LowRank(to_xp(xp, {"w": np.eye(2)}), xp.ones((2,)), Diagonal({"w": xp.zeros((2,))}))
    with pytest.raises(
        BecameError, match=r"^the precision of 'w' has zero entries and so no inverse; add a multiple of"
    ):
        bare.log_determinant()
    assert float(Dense.of(bare).log_determinant()) == 0.0  # as a matrix it has one


def test_what_is_no_low_rank_precision_is_refused(xp: Any) -> None:
    ground = Diagonal({"w": xp.ones((2,))})
    with pytest.raises(BecameError, match=r"^the scales have negative or NaN entries; they must be at least 0\.$"):
        LowRank({"w": xp.ones((2, 1))}, -xp.ones((1,)), ground)
    with pytest.raises(BecameError, match=r"^the scales have shape \(1, 1\); they must be a vector\.$"):
        LowRank({"w": xp.ones((2, 1))}, xp.ones((1, 1)), ground)
    with pytest.raises(
        BecameError, match=r"^the diagonal lacks 'v', which has a factor; give it an entry, if of zeros\.$"
    ):
        LowRank({"v": xp.ones((2, 1))}, xp.ones((1,)), ground)
    with pytest.raises(BecameError, match=r"^the factor of 'w' has shape \(2, 1\); it must be \(2, 3\)\.$"):
        LowRank({"w": xp.ones((2, 1))}, xp.ones((3,)), ground)


@pytest.mark.parametrize(("columns", "scale", "ground"), [(1000, 10.0, 1e-3), (1000, 10.0, 1e-4), (2, 1e6, 1e-2)])
def test_what_has_an_inverse_keeps_its_digits_in_float32(xp: Any, columns: int, scale: float, ground: float) -> None:
    """Both terms of the inverse are far larger than their difference, and float32 has seven digits."""
    draw = np.random.default_rng(0)
    factor = draw.normal(size=(3, columns)).astype(np.float32)
    scales, diagonal = np.full(columns, scale, np.float32), np.full(3, ground, np.float32)
    matrix = low_rank_matrix(factor.astype(float), scales.astype(float), diagonal.astype(float))
    precision = LowRank(to_xp(xp, {"w": factor}), to_xp(xp, scales), Diagonal(to_xp(xp, {"w": diagonal})))
    one = to_xp(xp, {"w": np.ones(3, np.float32)})

    np.testing.assert_allclose(to_numpy(precision.inverse_diagonal()["w"]), np.diag(np.linalg.inv(matrix)), rtol=1e-5)
    np.testing.assert_allclose(to_numpy(precision.solve(one)["w"]), np.linalg.solve(matrix, np.ones(3)), rtol=1e-4)
    assert float(precision.log_determinant()) == pytest.approx(np.linalg.slogdet(matrix)[1], rel=1e-5)
    axes = [to_xp(xp, {"w": row}) for row in np.eye(3, dtype=np.float32)]
    root = np.stack([to_numpy(precision.sample(axis)["w"]) for axis in axes])
    np.testing.assert_allclose(root.T @ root, np.linalg.inv(matrix), rtol=1e-3, atol=1e-4 * np.linalg.inv(matrix).max())


def test_an_inverse_that_would_be_rounding_is_refused(xp: Any) -> None:
    precision = low_rank(xp, 1e15)
    for ask in (precision.inverse_diagonal, precision.log_determinant):
        with pytest.raises(BecameError, match="its inverse would be rounding; add a multiple of the identity"):
            ask()
