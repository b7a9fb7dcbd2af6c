"""Gram matrices of layer inputs, against explicit loops."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from became_core.curvature import Tap, input_grams
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), data=st.data())
def test_a_gram_matrix_sums_over_batches_samples_and_positions(xp: Any, sizes: list[int], data: st.DataObject) -> None:
    inputs = [data.draw(eighths((size, 2, 3))) for size in sizes]
    batches = [{"fc": Tap("matrix", to_xp(xp, a), xp.zeros((a.shape[0], 2, 5)))} for a in inputs]
    grams = input_grams(batches, frozenset({"fc.weight"}))
    expected = sum(np.outer(row, row) for a in inputs for row in a.reshape(-1, 3))
    np.testing.assert_array_equal(to_numpy(grams["fc.weight"]), expected)


def test_only_the_weights_asked_for_have_one(xp: Any) -> None:
    tap = Tap("matrix", xp.ones((1, 1, 2)), xp.ones((1, 1, 2)))
    assert list(input_grams([{"fc1": tap, "heads.0": tap}], frozenset({"fc1.weight", "fc2.weight"}))) == ["fc1.weight"]
