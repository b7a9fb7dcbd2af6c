from typing import Any

import numpy as np
import pytest

from became_core import BecameError
from became_core.laplace import Dense, Diagonal
from tests.backends import to_numpy, to_xp

MATRIX = np.asarray([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]])


def test_parameters_are_sorted_by_name_in_whatever_order_they_are_given(xp: Any) -> None:
    u = to_xp(xp, {"w": np.asarray([0.0, 1.0]), "b": np.asarray([4.0])})
    for shapes in ({"w": (2,), "b": (1,)}, {"b": (1,), "w": (2,)}):
        applied = Dense(to_xp(xp, MATRIX), shapes).apply(u)
        np.testing.assert_array_equal(to_numpy(applied["b"]), [8.0])
        np.testing.assert_array_equal(to_numpy(applied["w"]), [4.5, 1.0])


def test_matrices_over_different_parameters_add(xp: Any) -> None:
    left = Dense(to_xp(xp, MATRIX), {"b": (1,), "w": (2,)})
    right = Dense(to_xp(xp, 8 * MATRIX), {"a": (1,), "w": (2,)})
    total = left + right
    assert isinstance(total, Dense)
    assert list(total.covered()) == ["a", "b", "w"]
    expected = np.zeros((4, 4))
    expected[1:, 1:] += MATRIX
    expected[np.ix_([0, 2, 3], [0, 2, 3])] += 8 * MATRIX
    np.testing.assert_array_equal(to_numpy(total.matrix), expected)


def test_a_diagonal_over_more_parameters_is_shared_out(xp: Any) -> None:
    """A matrix for the last layer and a diagonal prior over all: two blocks, and so an inverse."""
    prior = Diagonal(to_xp(xp, {"b": np.ones(1), "conv": np.full(2, 4.0), "w": np.ones(2)}))
    layer = Dense(to_xp(xp, MATRIX), {"b": (1,), "w": (2,)})
    for total in (prior + layer, layer + prior):
        expected = np.linalg.slogdet(MATRIX + np.eye(3))[1] + 2 * np.log(4)
        assert float(total.log_determinant()) == pytest.approx(expected, rel=1e-13)


def test_what_is_no_precision_matrix_is_refused(xp: Any) -> None:
    with pytest.raises(
        BecameError, match=r"^the precision matrix has shape \(3, 3\) but its parameters have 4 entries;"
    ):
        Dense(to_xp(xp, MATRIX), {"w": (2, 2)})
    with pytest.raises(BecameError, match=r"^the precision matrix is not symmetric; a curvature is\.$"):
        Dense(to_xp(xp, np.tril(MATRIX)), {"w": (3,)})
    with pytest.raises(BecameError, match=r"^the precision matrix has negative or NaN entries on its diagonal; a curv"):
        Dense(to_xp(xp, np.full((1, 1), np.nan)), {"w": (1,)})
    with pytest.raises(BecameError, match=r"^the precision matrix has dtype .*int64; it must hold real floating-point"):
        Dense(to_xp(xp, np.ones((1, 1), dtype=np.int64)), {"w": (1,)})


def test_a_matrix_with_a_negative_eigenvalue_has_no_inverse(xp: Any) -> None:
    """Its diagonal alone does not betray it."""
    indefinite = Dense(to_xp(xp, np.asarray([[1.0, 2.0], [2.0, 1.0]])), {"w": (2,)})
    with pytest.raises(
        BecameError, match=r"^the precision matrix is singular to rounding and has no inverse; add a mu"
    ):
        indefinite.log_determinant()
    assert float(indefinite.damped(2.0).log_determinant()) == pytest.approx(np.log(5.0), rel=1e-14)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_what_counts_as_rounding_is_a_share_of_the_largest_entry(xp: Any, scale: float) -> None:
    def precision(upper: float) -> Dense:
        matrix = np.asarray([[2.0, upper], [1.0, 3.0]])
        return Dense(to_xp(xp, scale * matrix), {"w": (2,)})

    assert float(precision(1 + 1e-10).log_determinant()) == pytest.approx(np.log(5) + 2 * np.log(scale), rel=1e-9)
    with pytest.raises(BecameError, match="is not symmetric"):
        precision(1 + 1e-5)
    singular = Dense(to_xp(xp, scale * np.diag([1.0, 1e-17])), {"w": (2,)})
    with pytest.raises(BecameError, match="is singular to rounding"):
        singular.log_determinant()
