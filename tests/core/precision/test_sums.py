from typing import Any

import numpy as np
import pytest

from became_core import BecameError
from became_core.laplace import Dense, Diagonal, Isotropic, Kronecker, LowRank, Precision, Sum
from tests.backends import to_numpy, to_xp

A, G = np.asarray([[2.0, 1.0], [1.0, 2.0]]), np.asarray([[1.0, 0.5], [0.5, 1.0]])


def one_of_each(xp: Any, shape: tuple[int, ...] = (2, 2)) -> dict[str, Precision]:
    values = to_xp(xp, {"w": np.arange(1.0, 5.0).reshape(shape)})
    return {
        "diagonal": Diagonal(values),
        "isotropic": Isotropic.over(values, 0.5),
        "kronecker": Kronecker({"w": (to_xp(xp, A), to_xp(xp, G))}),
        "low rank": LowRank(to_xp(xp, {"w": np.ones((*shape, 1))}), to_xp(xp, np.ones(1)), Diagonal(values)),
        "dense": Dense(to_xp(xp, np.kron(A, G)), {"w": shape}),
    }


@pytest.mark.parametrize(
    ("left", "right", "kind"),
    [
        ("diagonal", "diagonal", Diagonal),
        ("diagonal", "isotropic", Diagonal),
        ("isotropic", "isotropic", Isotropic),
        ("diagonal", "low rank", LowRank),
        ("isotropic", "low rank", LowRank),
        ("low rank", "low rank", LowRank),
        ("isotropic", "kronecker", Kronecker),
        ("diagonal", "kronecker", Sum),
        ("kronecker", "kronecker", Sum),
        ("low rank", "kronecker", Sum),
        ("dense", "dense", Dense),
        ("dense", "diagonal", Dense),
        ("dense", "kronecker", Dense),
        ("dense", "low rank", Dense),
    ],
)
def test_sums_are_of_one_structure_where_that_is_exact(xp: Any, left: str, right: str, kind: type) -> None:
    each = one_of_each(xp)
    assert type(each[left] + each[right]) is kind
    assert type(each[right] + each[left]) is kind


def test_a_sum_of_many_stays_as_short_as_it_can_be(xp: Any) -> None:
    each = one_of_each(xp)
    total = each["kronecker"] + each["diagonal"] + each["low rank"] + each["isotropic"] + each["diagonal"]
    assert isinstance(total, Sum)
    assert sorted(type(term).__name__ for term in total.terms) == ["Kronecker", "LowRank"]
    assert type(total + each["dense"]) is Dense


def test_terms_that_share_no_parameter_are_blocks_of_which_each_is_damped(xp: Any) -> None:
    blocks = one_of_each(xp)["kronecker"] + Diagonal(to_xp(xp, {"b": np.ones(1)}))
    damped = blocks.damped(0.5)
    matrix = np.zeros((5, 5))
    matrix[0, 0], matrix[1:, 1:] = 1.0, np.kron(G, A)
    assert float(damped.log_determinant()) == pytest.approx(np.linalg.slogdet(matrix + 0.5 * np.eye(5))[1], rel=1e-13)


@pytest.mark.parametrize("as_array", [False, True])
def test_terms_that_share_a_parameter_are_damped_together(xp: Any, as_array: bool) -> None:
    each = one_of_each(xp)
    amount = to_xp(xp, np.asarray(0.5)) if as_array else 0.5
    damped = Dense.of((each["kronecker"] + each["diagonal"]).damped(amount))
    assert isinstance(damped, Dense)
    expected = np.kron(G, A) + np.diag(np.arange(1.0, 5.0)) + 0.5 * np.eye(4)
    np.testing.assert_allclose(to_numpy(damped.matrix), expected, rtol=1e-15)


def test_what_has_no_closed_form_says_what_would_help(xp: Any) -> None:
    each = one_of_each(xp)
    total = each["kronecker"] + each["diagonal"]
    with pytest.raises(
        BecameError,
        match=r"^the inverse of a sum, Kronecker \+ Diagonal, has no closed form where its terms share a parameter, "
        r"'w'; ask `Dense\.of` for it, if the model is small\.$",
    ):
        total.log_determinant()
    expected = np.linalg.slogdet(np.kron(G, A) + np.diag(np.arange(1.0, 5.0)))[1]
    assert float(Dense.of(total).log_determinant()) == pytest.approx(expected, rel=1e-13)


def test_a_weight_known_as_a_matrix_takes_the_others_shape(xp: Any) -> None:
    each = one_of_each(xp, (2, 1, 2, 1))
    for total in (each["kronecker"] + each["diagonal"], each["diagonal"] + each["kronecker"]):
        assert total.covered() == {"w": (2, 1, 2, 1)}
        diagonal = total.diagonal()["w"]
        assert tuple(diagonal.shape) == (2, 1, 2, 1)
        np.testing.assert_array_equal(to_numpy(diagonal).ravel(), np.diag(np.kron(G, A)) + np.arange(1.0, 5.0))
    assert (each["kronecker"] + each["dense"]).covered() == {"w": (2, 1, 2, 1)}


def test_arrays_of_two_dtypes_add(xp: Any) -> None:
    narrow = Diagonal(to_xp(xp, {"w": np.ones(2, dtype=np.float32)}))
    wide = Diagonal(to_xp(xp, {"w": np.ones(2)}))
    total = narrow + wide
    assert total.diagonal()["w"].dtype == xp.float64
