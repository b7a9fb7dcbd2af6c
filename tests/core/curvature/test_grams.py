"""Gram matrices of layer inputs and of gradients, against explicit loops."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.curvature import GramSums, Tap, gradient_grams, grams, input_grams
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths, few_if_compiled

SIZES = few_if_compiled(st.lists(st.integers(1, 4), min_size=1, max_size=3), [[1], [4], [2, 4, 1]])
# Of images, channels, and a window's height and width.
WINDOWS = few_if_compiled(st.tuples(*[st.integers(1, 3)] * 4), [(1, 1, 1, 1), (3, 2, 2, 3), (2, 3, 3, 1)])


@given(sizes=SIZES, data=st.data())
def test_a_gram_matrix_is_a_mean_over_batches_samples_and_positions(
    xp: Any, sizes: list[int], data: st.DataObject
) -> None:
    inputs = [data.draw(eighths((size, 2, 3))) for size in sizes]
    batches = [{"fc": Tap("matrix", to_xp(xp, a), xp.zeros((a.shape[0], 2, 5)))} for a in inputs]
    result = to_numpy(input_grams(batches, frozenset({"fc.weight"}))["fc.weight"])
    rows = np.concatenate([a.reshape(-1, 3) for a in inputs])
    expected = np.mean([np.outer(row, row) for row in rows], axis=0)
    if len(rows) < 3:  # With fewer inputs than columns, a factor is returned.
        assert result.shape == (len(rows), 3)
        result = result.T @ result
    np.testing.assert_allclose(result, expected, rtol=1e-14, atol=1e-15)


def test_a_wide_layers_gram_matrix_is_made_of_blocks(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "SYMMETRIC", 2)
    rows = np.random.default_rng(0).normal(size=(13, 11))
    result = input_grams(
        [{"fc": Tap("matrix", to_xp(xp, rows[:, None]), xp.zeros((13, 1, 1)))}], frozenset({"fc.weight"})
    )
    np.testing.assert_allclose(to_numpy(result["fc.weight"]), rows.T @ rows / 13, rtol=1e-13, atol=1e-15)


@given(sizes=SIZES, data=st.data())
def test_a_gram_matrix_of_gradients_is_a_mean_over_batches(xp: Any, sizes: list[int], data: st.DataObject) -> None:
    pairs = [(data.draw(eighths((size, 2, 3))), data.draw(eighths((size, 2, 4)))) for size in sizes]
    batches = [{"fc": Tap("matrix", to_xp(xp, a), to_xp(xp, g), has_bias=True)} for a, g in pairs]
    result = gradient_grams(batches, frozenset({"fc.weight"}))
    gradients = [np.einsum("nlo,nli->oi", g, a) / len(a) for a, g in pairs]  # of the batch's mean loss
    expected = np.mean([gradient.T @ gradient for gradient in gradients], axis=0)
    assert list(result) == ["fc.weight"]
    np.testing.assert_allclose(to_numpy(result["fc.weight"]), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("function", [input_grams, gradient_grams])
def test_only_the_wanted_weights_have_gram_matrices(xp: Any, function: Any) -> None:
    tap = Tap("matrix", xp.ones((1, 1, 2)), xp.ones((1, 1, 2)))
    assert list(function([{"fc1": tap, "heads.0": tap}], frozenset({"fc1.weight", "fc2.weight"}))) == ["fc1.weight"]


def test_half_precision_is_summed_in_float32(xp: Any) -> None:
    if not hasattr(xp, "float16"):
        pytest.skip("this backend has no half precision")
    inputs = xp.full((3, 1, 2), 300.0, dtype=xp.float16)  # Its square is more than float16 can represent.
    gram = input_grams([{"fc": Tap("matrix", inputs, inputs)}], frozenset({"fc.weight"}))["fc.weight"]
    assert gram.dtype == xp.float32
    np.testing.assert_array_equal(to_numpy(gram), 90000)


@given(data=st.data(), sizes=WINDOWS)
def test_a_window_has_the_gram_matrix_of_its_patches(
    xp: Any, data: st.DataObject, sizes: tuple[int, int, int, int]
) -> None:
    count, channels, height, width = sizes
    images = data.draw(eighths((count, channels, 4, 5)))
    patches = [
        images[n, :, p : p + height, q : q + width].reshape(-1)
        for n in range(count)
        for p in range(5 - height)
        for q in range(6 - width)
    ]
    expected = np.mean([np.outer(a, a) for a in patches], axis=0)
    window = Tap("window", to_xp(xp, images), xp.zeros((0,)), kernel=(height, width))
    # A matrix may have its images beside its patches.
    rows = to_xp(xp, np.reshape(patches, (count, -1, channels * height * width)))
    matrix = Tap("matrix", rows, rows, kernel=(height, width), images=window.inputs)
    for tap in (window, matrix):
        result = to_numpy(input_grams([{"conv": tap}], frozenset({"conv.weight"}))["conv.weight"])
        np.testing.assert_allclose(result, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2, 2], [5, 1, 4]])
def test_sums_of_single_batches_add_up(xp: Any, sizes: list[int]) -> None:
    rng, weights = np.random.default_rng(0), frozenset({"fc.weight"})
    batches = [{"fc": Tap("matrix", to_xp(xp, a), to_xp(xp, a))} for a in (rng.normal(size=(n, 1, 3)) for n in sizes)]
    together = GramSums()
    for taps in batches:
        alone = GramSums()
        alone.add(taps, weights)
        together.add_parts(alone.parts())
    expected = to_numpy(input_grams(batches, weights)["fc.weight"])
    for _ in range(2):  # asking changes nothing
        np.testing.assert_allclose(to_numpy(together.means()["fc.weight"]), expected, rtol=1e-13)


def _uses(xp: Any) -> dict[str, Tap]:
    """Return taps of a weight [3, 3] that is used in several ways."""
    rows = xp.ones((2, 1, 3))
    looked_up = Tap("embedding", xp.asarray([[0], [2]]), rows, size=3, own_name=True)
    product = Tap("matrix", rows, rows, own_name=True)
    return {
        "as it is": product,
        "turned": replace(product, transposed=True),
        "wider": Tap("matrix", xp.ones((2, 1, 4)), rows, own_name=True),
        "looked up": looked_up,
        "tied": replace(looked_up, others=(product,)),
        "scaled": replace(product, kind="scale"),
    }


@pytest.mark.parametrize("later", ["turned", "wider", "looked up", "scaled"])
def test_a_weight_that_a_later_batch_uses_in_another_way_is_refused(xp: Any, later: str) -> None:
    uses = _uses(xp)
    message = "'w' is multiplied as a whole in one batch and used in another way in another batch"
    for ways in (["as it is", later], [later, "as it is"]):
        with pytest.raises(BecameError, match=message):
            input_grams([{"w": uses[way]} for way in ways], frozenset({"w"}))
    if later != "scaled":
        input_grams([{"w": uses[later]}, {"w": uses[later]}], frozenset({"w"}))


def test_a_lookup_that_is_a_product_too_has_no_gram_matrix(xp: Any) -> None:
    with pytest.raises(BecameError, match="'w' is multiplied as a whole in one batch and used in another way"):
        input_grams([{"w": _uses(xp)["tied"]}], frozenset({"w"}))
