"""Sums of many numbers in single precision, against the exact sum; slabs that cover everything once."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import optimal_alpha
from became_core.arrays import inner_product, slabs, staged_sum
from tests.backends import to_numpy

# The analysis for 10^9 elements, which do not fit a test. A number goes through log2(n) additions, each of which errs
# by u = 2^-24 = 6e-8 relative at most, by a third of it on average: 24 additions here, 30 for 10^9. Rounding to either
# side, they leave some 6e-8 * sqrt(30) / 2 = 1.6e-7; all to one side, as among equal numbers, 30 * 6e-8 / 3 = 6e-7.
# Where values exist, the first 9 additions are an inner product of 512 elements, in 16 partial sums of 32 or shorter:
# 2e-7 on average if all err to one side. So what holds here to 5e-7 holds there to 1e-6.
COUNT = 2**24


@pytest.mark.parametrize("values", ["constant", "uniform", "heavy"])
def test_a_sum_in_single_precision_is_right_to_1e_6(xp: Any, values: str) -> None:
    draw = np.random.default_rng(0)
    numbers = {
        "constant": np.full(COUNT, 0.1, dtype=np.float32),  # where adding one by one stands still
        "uniform": draw.random(COUNT, dtype=np.float32),
        "heavy": np.exp(4 * draw.standard_normal(COUNT, dtype=np.float32)),
    }[values]
    exact = math.fsum(numbers.astype(np.float64).reshape(-1, 4096).sum(axis=1))
    assert float(staged_sum(xp.asarray(numbers))) == pytest.approx(exact, rel=5e-7)


def test_alpha_of_many_elements_in_single_precision(xp: Any) -> None:
    draw = np.random.default_rng(1)
    gp, hat, old, new = (draw.random(COUNT // 4, dtype=np.float32) for _ in range(4))
    delta = (hat - gp).astype(np.float64)
    top, rest = np.sum(delta**2 * new), np.sum(delta**2 * old)
    found = float(optimal_alpha(*(xp.asarray(each) for each in (gp, hat, old, new))))
    assert found == pytest.approx(top / (top + rest), rel=1e-6)


@given(size=st.integers(1, 400))
def test_a_staged_sum_takes_every_element_once(xp: Any, size: int) -> None:
    assert float(staged_sum(xp.asarray(2.0 ** (np.arange(size) % 40)))) == float(np.sum(2.0 ** (np.arange(size) % 40)))


@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (2**16 + 1,), (3, 2**16)])
def test_slabs_cover_everything_once(xp: Any, shape: tuple[int, ...]) -> None:
    numbers = np.arange(math.prod(shape), dtype=float).reshape(shape)
    pieces = list(slabs([xp.asarray(numbers), xp.asarray(-numbers)]))
    assert max(int(piece[0].shape[0]) for piece in pieces) <= 2**16
    for index, sign in ((0, 1), (1, -1)):
        joined = np.concatenate([to_numpy(piece[index]) for piece in pieces])
        np.testing.assert_array_equal(joined, sign * numbers.ravel())
    dot = inner_product(pieces[0])
    assert sum(float(dot(left, right)) for left, right in pieces) == -float(np.sum(numbers**2))
