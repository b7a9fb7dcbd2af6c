"""Per-sample squares and batch gradients of layers, against explicit loops."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core.curvature import Tap
from became_core.curvature.taps import batch_gradient, per_sample_square_sum
from reference.formulas import squared_gradients
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths

Array = NDArray[np.float64]
Layer = tuple[Array, Array]


@st.composite
def layers(draw: st.DrawFn, *, positions: int = 3, scale: bool = False) -> Layer:
    """Inputs [n, l, d_in] and output gradients [n, l, d_out]: linear (l = 1) or convolution-like."""
    n, d_in = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    l, d_out = draw(st.integers(1, positions)), d_in if scale else draw(st.integers(1, 3))  # noqa: E741
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
    """y = w * a + b is the matrix diag(w), of which only the diagonal is free."""
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


def test_no_bias_without_one(xp: Any) -> None:
    taps = {"fc": Tap("matrix", xp.ones((2, 1, 3)), xp.ones((2, 1, 4)))}
    assert list(per_sample_square_sum(taps)) == list(batch_gradient(taps)) == ["fc.weight"]
