from typing import Any

import numpy as np
import pytest

from became_core import Diagonal, Isotropic, LowRank
from became_core.arrays import row_products
from became_core.arrays.products import PIECE
from became_core.curvature import Bernoulli, Categorical, Gaussian, Likelihood, Pushforward, derivatives_along
from became_core.precision import Precision
from tests.backends import to_numpy, to_xp
from tests.compilers import compiled, gradient_of

MANY = 2**21 + 3


def eighths_of(length: int, rows: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(-8, 9, size=(rows, length)) / 8


@pytest.mark.parametrize("length", [0, 1, PIECE, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1, 5 * PIECE + 7])
def test_each_number_is_multiplied_once(xp: Any, length: int) -> None:
    left, right = eighths_of(length, 2, 0), eighths_of(length, 3, 1)
    found = to_numpy(row_products(to_xp(xp, left), to_xp(xp, right)))
    np.testing.assert_array_equal(found, left @ right.T)  # sums of so small numbers are exact


def test_it_compiles_and_has_a_gradient(xp: Any, backend: str) -> None:
    left, right = eighths_of(2 * PIECE + 1, 2, 0), eighths_of(2 * PIECE + 1, 1, 1)
    given = to_xp(xp, left), to_xp(xp, right)
    np.testing.assert_array_equal(to_numpy(compiled(backend, row_products)(*given)), left @ right.T)
    gradient = gradient_of(backend, lambda rows: row_products(rows, given[1])[0, 0])(given[0])
    np.testing.assert_array_equal(to_numpy(gradient), np.stack([right[0], 0 * right[0]]))


def test_millions_of_numbers_are_summed_accurately_in_float32(xp: Any) -> None:
    """A running sum in float32 is off by up to a percent here, and always in one direction."""
    ones = xp.ones((MANY,), dtype=xp.float32)
    u, values = {"w": ones * 0.1}, {"w": ones * 0.3}
    precisions: dict[str, tuple[Precision, float]] = {
        "diagonal": (Diagonal(values), 0.003 * MANY),
        "isotropic": (Isotropic({"w": ones[0] * 0.3}, {"w": (MANY,)}), 0.003 * MANY),
        "low rank": (LowRank({"w": ones[:, None]}, ones[:1] * 0.3, Diagonal({"w": ones * 0.0})), 0.003 * MANY**2),
    }
    for name, (precision, expected) in precisions.items():
        # A low-rank matrix has two sums in its product.
        assert float(precision.inner(u, u)) == pytest.approx(expected, rel=4e-5), name


@pytest.mark.parametrize(
    "likelihood", [Categorical(), Gaussian(1.0), Bernoulli()], ids=lambda each: type(each).__name__
)
def test_curvatures_of_millions_of_outputs_are_summed_accurately(xp: Any, likelihood: Likelihood) -> None:
    rows, width = 2**11, 2**10
    logits = xp.zeros((rows, width), dtype=xp.float32)
    tangents = np.zeros((1, rows, width), dtype=np.float32)
    tangents[..., ::2] = 0.1
    is_class = isinstance(likelihood, Categorical)
    targets = xp.zeros((rows,), dtype=xp.int64) if is_class else logits
    _, curvature = derivatives_along([Pushforward(logits, xp.asarray(tangents), targets)], likelihood)
    expected = {"Categorical": 0.05**2, "Gaussian": width * 0.05 * 0.1, "Bernoulli": width * 0.05 * 0.1 / 4}
    assert float(curvature[0, 0]) == pytest.approx(expected[type(likelihood).__name__], rel=2e-5)
