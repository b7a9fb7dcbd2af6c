"""Per-sample squares and batch gradients of layers, against explicit loops."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core.curvature import (
    Tap,
    batch_gradient,
    inputs_of_uses,
    joined_uses,
    kronecker_factors,
    per_sample_factors,
    per_sample_gradients,
    per_sample_square_sum,
)
from became_core.curvature import taps as taps_module
from reference.formulas import embedding_gradients, grouped_gradients, kfac_factors, squared_gradients
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths, few_if_compiled

Array = NDArray[np.float64]
Layer = tuple[Array, Array]


# Samples, positions, inputs and outputs of a layer.
SIZES = few_if_compiled(
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    [(4, 3, 2, 3), (1, 1, 1, 1)],
)


@st.composite
def layers(draw: st.DrawFn, *, positions: int = 3, scale: bool = False) -> Layer:
    """Inputs [n, l, d_in] and output gradients [n, l, d_out]: linear (l = 1) or convolution-like."""
    n, l, d_in, d_out = draw(SIZES)  # noqa: E741
    l, d_out = min(l, positions), d_in if scale else d_out  # noqa: E741
    return draw(eighths((n, l, d_in))), draw(eighths((n, l, d_out)))


def tap_of(xp: Any, layer: Layer, *, kind: Any = "matrix") -> dict[str, Tap]:
    return {"fc": Tap(kind, to_xp(xp, layer[0]), to_xp(xp, layer[1]), has_bias=True)}


@pytest.mark.parametrize("positions", [1, 3])
@given(data=st.data())
def test_squares_of_a_matrix(xp: Any, positions: int, data: st.DataObject) -> None:
    layer = data.draw(layers(positions=positions))
    squares = per_sample_square_sum(tap_of(xp, layer))
    weight, bias = squared_gradients(*layer)
    np.testing.assert_array_equal(to_numpy(squares["fc.weight"]), weight)
    np.testing.assert_array_equal(to_numpy(squares["fc.bias"]), bias)


@given(layer=layers(scale=True))
def test_squares_of_a_scale(xp: Any, layer: Layer) -> None:
    """y = w * a + b is a layer with the matrix diag(w), whose diagonal alone is trained."""
    squares = per_sample_square_sum(tap_of(xp, layer, kind="scale"))
    weight, bias = squared_gradients(*layer)
    np.testing.assert_array_equal(to_numpy(squares["fc.weight"]), np.diagonal(weight))
    np.testing.assert_array_equal(to_numpy(squares["fc.bias"]), bias)


@given(layer=layers())
def test_the_gradient_of_a_matrix(xp: Any, layer: Layer) -> None:
    gradient = batch_gradient(tap_of(xp, layer))
    pairs = [(a, g) for inputs, outputs in zip(*layer, strict=True) for a, g in zip(inputs, outputs, strict=True)]
    np.testing.assert_array_equal(to_numpy(gradient["fc.weight"]), sum(np.outer(g, a) for a, g in pairs))
    np.testing.assert_array_equal(to_numpy(gradient["fc.bias"]), sum(g for _, g in pairs))


@given(layer=layers(scale=True))
def test_the_gradient_of_a_scale(xp: Any, layer: Layer) -> None:
    gradient = batch_gradient(tap_of(xp, layer, kind="scale"))
    pairs = [(a, g) for inputs, outputs in zip(*layer, strict=True) for a, g in zip(inputs, outputs, strict=True)]
    np.testing.assert_array_equal(to_numpy(gradient["fc.weight"]), sum(g * a for a, g in pairs))
    np.testing.assert_array_equal(to_numpy(gradient["fc.bias"]), sum(g for _, g in pairs))


@st.composite
def tapped(draw: st.DrawFn, kind: str) -> tuple[Any, dict[str, Any], Array, Array]:
    """Return a layer that is no plain matrix: its tap's kind and fields, per-sample gradients and output gradients."""
    n, positions, size, width = draw(SIZES)
    g = draw(eighths((n, positions, width)))
    if kind == "gradient":
        a = draw(eighths((n, 1, width)))
        return kind, {"inputs": a}, a[:, 0], np.ones((n, 1, 1))
    if kind == "scale":
        a = draw(eighths((n, positions, width)))
        return kind, {"inputs": a}, (a * g).sum(axis=1), g
    if kind == "embedding":
        indices = np.reshape(
            draw(st.lists(st.integers(0, size - 1), min_size=n * positions, max_size=n * positions)), (n, positions)
        )
        return kind, {"inputs": indices, "size": size}, embedding_gradients(indices, g, size), g
    groups = draw(few_if_compiled(st.integers(2, 3), [2]))
    g = draw(eighths((n, positions, groups * width)))
    a = draw(eighths((n, positions, groups * size)))
    return "matrix", {"inputs": a, "groups": groups}, grouped_gradients(a, g, groups), g


@pytest.mark.parametrize("layer", ["grouped", "scale", "embedding", "gradient"])
@given(data=st.data(), has_bias=st.booleans(), chunk=st.sampled_from([1, 20, 2**20]))
def test_every_kind_of_layer_agrees_with_an_explicit_loop(
    xp: Any, layer: str, data: st.DataObject, has_bias: bool, chunk: int
) -> None:
    """Per-sample gradients, the sums of their squares, and their sums do not depend on the chunks of samples."""
    kind, fields, expected, g = data.draw(tapped(layer))
    weight = "fc" if kind == "gradient" else "fc.weight"
    parts = {name: to_xp(xp, value) if name == "inputs" else value for name, value in fields.items()}
    has_bias = has_bias and kind != "gradient"
    taps = {"fc": Tap(kind, output_gradients=to_xp(xp, g), has_bias=has_bias, **parts)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taps_module, "CHUNK", chunk)
        squares = per_sample_square_sum(taps)
    gradients, total = per_sample_gradients(taps), batch_gradient(taps)
    assert set(squares) == set(gradients) == set(total) == {weight} | ({"fc.bias"} if has_bias else set())
    np.testing.assert_array_equal(to_numpy(gradients[weight]), expected)
    np.testing.assert_array_equal(to_numpy(squares[weight]), (expected**2).sum(axis=0))
    np.testing.assert_array_equal(to_numpy(total[weight]), expected.sum(axis=0))
    if has_bias:
        np.testing.assert_array_equal(to_numpy(gradients["fc.bias"]), g.sum(axis=1))
        np.testing.assert_array_equal(to_numpy(total["fc.bias"]), g.sum(axis=(0, 1)))


@pytest.mark.parametrize("positions", [1, 3])
@given(data=st.data())
def test_per_sample_gradients_of_a_matrix(xp: Any, positions: int, data: st.DataObject) -> None:
    a, g = data.draw(layers(positions=positions))
    gradients = per_sample_gradients(tap_of(xp, (a, g)))
    np.testing.assert_array_equal(to_numpy(gradients["fc.weight"]), np.einsum("nlo,nli->noi", g, a))
    np.testing.assert_array_equal(to_numpy(gradients["fc.bias"]), g.sum(axis=1))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_factors_of_per_sample_gradients(xp: Any, transposed: bool) -> None:
    draw = np.random.default_rng(0)
    a, g = draw.normal(size=(5, 1, 4)), draw.normal(size=(5, 1, 3))
    tap = Tap("matrix", to_xp(xp, a), to_xp(xp, g), has_bias=True, transposed=transposed)
    (left, right) = per_sample_factors({"fc": tap})["fc.weight"]
    whole = to_numpy(per_sample_gradients({"fc": tap})["fc.weight"])
    np.testing.assert_allclose(to_numpy(left)[:, :, None] * to_numpy(right)[:, None, :], whole, atol=1e-15)
    assert set(per_sample_gradients({"fc": tap}, without=["fc.weight"])) == {"fc.bias"}


def test_only_large_matrices_with_one_position_have_factors(xp: Any) -> None:
    def tap(positions: int, d_in: int, d_out: int, kind: Any = "matrix", **others: Any) -> Tap:
        return Tap(kind, xp.ones((2, positions, d_in)), xp.ones((2, positions, d_out)), **others)

    large = tap(1, 4, 4)
    taps = {
        "large": large,
        "convolution": tap(2, 4, 4),
        "small": tap(1, 2, 2),
        "grouped": tap(1, 4, 4, groups=2),
        "scale": tap(1, 4, 4, kind="scale"),
        "shared": tap(1, 4, 4, others=(large,)),
    }
    assert list(per_sample_factors(taps)) == ["large.weight"]


def test_an_index_that_repeats_in_a_sample_is_squared_once(xp: Any) -> None:
    """The result for the first row is (1 + 2)^2 + 4^2, not 1^2 + 2^2 + 4^2."""
    indices, g = np.asarray([[0, 0], [0, 2]]), np.asarray([[[1.0], [2.0]], [[4.0], [8.0]]])
    taps = {"words": Tap("embedding", to_xp(xp, indices), to_xp(xp, g), size=4)}
    np.testing.assert_array_equal(to_numpy(per_sample_square_sum(taps)["words.weight"]).ravel(), [25, 0, 64, 0])


@pytest.mark.parametrize("kind", ["matrix", "scale"])
def test_half_precision_is_summed_in_single(xp: Any, kind: Any) -> None:
    """300^2 is more than float16 can represent."""
    if not hasattr(xp, "float16"):
        pytest.skip("the standard, read strictly, has no float16")
    a = xp.astype(xp.full((2, 1, 1), 300.0), xp.float16)
    taps = {"fc": Tap(kind, a, xp.ones_like(a), has_bias=True)}
    for sums, expected in ((per_sample_square_sum(taps), 180000), (batch_gradient(taps), 600)):
        assert sums["fc.weight"].dtype == xp.float32
        assert float(xp.reshape(sums["fc.weight"], (-1,))[0]) == expected


def test_a_layer_without_bias_has_no_bias_gradient(xp: Any) -> None:
    taps = {"fc": Tap("matrix", xp.ones((2, 1, 3)), xp.ones((2, 1, 4)))}
    assert list(per_sample_square_sum(taps)) == list(batch_gradient(taps)) == ["fc.weight"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunk", [8, 80, 200])
def test_squares_of_a_large_matrix_are_summed_by_blocks_of_its_rows(
    xp: Any, monkeypatch: pytest.MonkeyPatch, transposed: bool, chunk: int
) -> None:
    rng = np.random.default_rng(0)
    a, g = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 2, 5))
    tap = Tap("matrix", to_xp(xp, a), to_xp(xp, g), transposed=transposed)
    monkeypatch.setattr(taps_module, "CHUNK", chunk)  # one row, two or three, all of them
    squares = to_numpy(per_sample_square_sum({"fc": tap})["fc.weight"])
    expected = (np.einsum("nlo,nli->noi", g, a) ** 2).sum(0)
    np.testing.assert_allclose(squares, expected.T if transposed else expected, rtol=1e-13)


@pytest.mark.parametrize("positions", [1, 3])
def test_gradients_pass_through_the_sum_of_squares(xp: Any, backend: str, positions: int) -> None:
    if backend != "torch":
        pytest.skip("only PyTorch's gradients notice an array that was overwritten")
    inputs, gradients = xp.ones((5, positions, 2)), xp.ones((5, positions, 3)).requires_grad_()
    squares = per_sample_square_sum({"fc": Tap("matrix", inputs, gradients, True)})
    sum(square.sum() for square in squares.values()).backward()
    # d/dg of (p g)^2 for each of two inputs and the bias, p being the number of positions.
    np.testing.assert_allclose(to_numpy(gradients.grad), np.full((5, positions, 3), 3 * 2 * positions))


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
def test_keys_of_a_narrow_dtype_are_those_of_a_wide_one(xp: Any, dtype: Any) -> None:
    """The numbers by which samples are kept apart, size x samples, are too large for it."""
    draw = np.random.default_rng(0)
    size = 200
    keys, gradients = draw.integers(0, size, (200, 3)), draw.normal(size=(200, 3, 2))
    narrow, wide = (
        per_sample_square_sum(
            {"words": Tap("embedding", xp.asarray(keys.astype(kind)), to_xp(xp, gradients), size=size)}
        )
        for kind in (dtype, np.int32)
    )
    np.testing.assert_array_equal(to_numpy(narrow["words.weight"]), to_numpy(wide["words.weight"]))


@given(uses=st.tuples(*[st.tuples(eighths((4, 1, 3)), eighths((4, 1, 2)), eighths((4, 1, 2)))] * 2))
def test_uses_of_one_weight_share_their_inputs_with_other_passes_of_the_batch(xp: Any, uses: Any) -> None:
    """By that, Kronecker factors count them once, and add up the gradients of all passes."""
    passes = [[Tap("matrix", to_xp(xp, use[0]), to_xp(xp, use[side])) for use in uses] for side in (1, 2)]
    first = joined_uses(passes[0])
    second = joined_uses(passes[1], inputs_of_uses({"fc": first})["fc"])
    assert second.inputs is first.inputs
    a, g, h = (np.concatenate([use[side] for use in uses], axis=1) for side in range(3))
    np.testing.assert_array_equal(to_numpy(second.output_gradients), h)
    factors, _ = kronecker_factors([{"fc": first}, {"fc": second}], samples=4)
    expected = kfac_factors(a, g, "expand")
    np.testing.assert_array_equal(to_numpy(factors["fc.weight"][0]), expected[0])
    np.testing.assert_array_equal(to_numpy(factors["fc.weight"][1]), expected[1] + kfac_factors(a, h, "expand")[1])
