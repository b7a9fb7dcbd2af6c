"""Kronecker factors, against explicit loops and against the blocks that they approximate."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.curvature import Tap, kronecker_factors
from reference.formulas import grouped_gradients, kfac_factors
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths

# Two and six samples, two positions, so that all means are exact.
LAYERS = st.tuples(*[st.tuples(eighths((n, 2, 3)), eighths((n, 2, 2))) for n in (2, 6)])


def tap_of(xp: Any, layer: Any, **fields: Any) -> Tap:
    return Tap("matrix", to_xp(xp, layer[0]), to_xp(xp, layer[1]), **fields)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@given(batches=LAYERS)
def test_factors_are_those_of_the_definition(xp: Any, sharing: Any, batches: Any) -> None:
    taps = [{"conv": tap_of(xp, batch, has_bias=True)} for batch in batches]
    factors, diagonal = kronecker_factors(taps, samples=8, sharing=sharing)
    a, g = (np.concatenate(part) for part in zip(*batches, strict=True))
    expected = kfac_factors(a, g, sharing)
    assert set(factors) == {"conv.weight", "conv.bias"}
    assert not diagonal
    for factor, correct in zip(factors["conv.weight"], expected, strict=True):
        np.testing.assert_array_equal(to_numpy(factor), correct)
    np.testing.assert_array_equal(to_numpy(factors["conv.bias"][0]), [[1.0]])
    np.testing.assert_array_equal(to_numpy(factors["conv.bias"][1]), expected[1])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@given(a=eighths((1, 1, 3)), g=eighths((1, 1, 2)))
def test_one_sample_at_one_position_is_exact(xp: Any, sharing: Any, a: Any, g: Any) -> None:
    """The Kronecker product is the outer product of the gradient with itself."""
    factors, _ = kronecker_factors([{"fc": tap_of(xp, (a, g))}], samples=1, sharing=sharing)
    gradient = np.outer(g, a).ravel()
    kronecker = np.kron(*(to_numpy(factor) for factor in factors["fc.weight"][::-1]))
    np.testing.assert_array_equal(kronecker, np.outer(gradient, gradient))


@given(layer=st.tuples(eighths((4, 2, 3)), eighths((4, 2, 2))), other=eighths((4, 2, 2)))
def test_passes_of_one_batch_share_their_inputs(xp: Any, layer: Any, other: Any) -> None:
    """If a batch has several sets of taps, A is counted once and the G of all sets are added."""
    first = tap_of(xp, layer)
    passes = [{"fc": first}, {"fc": Tap("matrix", first.inputs, to_xp(xp, other))}]
    factors, _ = kronecker_factors(passes, samples=4)
    a, g = kfac_factors(layer[0], layer[1], "expand")
    np.testing.assert_array_equal(to_numpy(factors["fc.weight"][0]), a)
    expected = g + kfac_factors(layer[0], other, "expand")[1]
    np.testing.assert_array_equal(to_numpy(factors["fc.weight"][1]), expected)


@given(a=eighths((4, 2, 4)), g=eighths((4, 2, 2)))
def test_a_parameter_that_is_no_plain_matrix_has_its_diagonal(xp: Any, a: Any, g: Any) -> None:
    lone = Tap("gradient", to_xp(xp, a[:, :1]), to_xp(xp, np.ones((4, 1, 1))))
    taps = {"conv": tap_of(xp, (a, g), groups=2, has_bias=True), "token": lone}
    factors, diagonal = kronecker_factors([taps], samples=4)
    assert not factors
    expected = (grouped_gradients(a, g, 2) ** 2).mean(axis=0)
    np.testing.assert_array_equal(to_numpy(diagonal["conv.weight"]), expected)
    np.testing.assert_array_equal(to_numpy(diagonal["conv.bias"]), (g.sum(axis=1) ** 2).mean(axis=0))
    np.testing.assert_array_equal(to_numpy(diagonal["token"]), (a[:, 0] ** 2).mean(axis=0))


def test_no_samples_is_an_error() -> None:
    with pytest.raises(BecameError, match=r"^Kronecker factors need at least one sample; none was given\.$"):
        kronecker_factors([], samples=0)
