from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.curvature import Tap, diagonal_fisher
from became_core.curvature import fisher as fisher_module
from reference.formulas import squared_gradients, squared_mean_gradient
from tests.backends import to_numpy, to_xp
from tests.strategies import eighths, few_if_compiled

# A convolution [2, 1, 2, 2] with three positions, in batches of six and two samples. A mean over eight samples is
# exact, while one over six depends on whether the framework divides or multiplies by the inverse, as XLA does.
PARAMETERS = {"conv.weight": np.zeros((2, 1, 2, 2)), "conv.bias": np.zeros(2)}
BATCHES = st.tuples(*[st.tuples(eighths((n, 3, 4)), eighths((n, 3, 2))) for n in (6, 2)])


def taps_of(xp: Any, batches: Any) -> Any:
    return ({"conv": Tap("matrix", to_xp(xp, a), to_xp(xp, g), has_bias=True)} for a, g in batches)


@given(batches=BATCHES)
def test_empirical_is_the_mean_of_squared_per_sample_gradients(xp: Any, batches: Any) -> None:
    fisher = diagonal_fisher(taps_of(xp, batches), to_xp(xp, PARAMETERS), "empirical", samples=8)
    weight, bias = squared_gradients(*(np.concatenate(part) for part in zip(*batches, strict=True)))
    np.testing.assert_array_equal(to_numpy(fisher["conv.weight"]), (weight / 8).reshape(2, 1, 2, 2))
    np.testing.assert_array_equal(to_numpy(fisher["conv.bias"]), bias / 8)


@given(batches=BATCHES)
def test_batch_is_the_published_estimate_of_which_a_smaller_batch_has_its_own_size(xp: Any, batches: Any) -> None:
    """The published sum is of n (mean gradient)^2 over batches of n samples, by all samples; ours is 6 times it."""
    fisher = diagonal_fisher(taps_of(xp, batches), to_xp(xp, PARAMETERS), "batch", samples=8, sizes=[6, 2])
    (first, first_bias), (second, second_bias) = (squared_mean_gradient(*batch) for batch in batches)
    weight, bias = 6 * (first + second) / 8, 6 * (first_bias + second_bias) / 8
    np.testing.assert_allclose(to_numpy(fisher["conv.weight"]), weight.reshape(2, 1, 2, 2), rtol=1e-13)
    np.testing.assert_allclose(to_numpy(fisher["conv.bias"]), bias, rtol=1e-13)


@given(batches=BATCHES)
def test_batches_of_one_sample_make_the_two_kinds_equal(xp: Any, batches: Any) -> None:
    singles = [(a[i : i + 1], g[i : i + 1]) for a, g in batches for i in range(len(a))]
    kinds = [
        diagonal_fisher(taps_of(xp, singles), to_xp(xp, PARAMETERS), kind, samples=8) for kind in ("empirical", "batch")
    ]
    for name in PARAMETERS:
        np.testing.assert_array_equal(to_numpy(kinds[0][name]), to_numpy(kinds[1][name]))


@given(batches=BATCHES)
def test_how_samples_are_batched_does_not_matter(xp: Any, batches: Any) -> None:
    whole = [tuple(np.concatenate(part) for part in zip(*batches, strict=True))]
    split = diagonal_fisher(taps_of(xp, batches), to_xp(xp, PARAMETERS), "empirical", samples=8)
    together = diagonal_fisher(taps_of(xp, whole), to_xp(xp, PARAMETERS), "empirical", samples=8)
    for name in PARAMETERS:
        np.testing.assert_array_equal(to_numpy(split[name]), to_numpy(together[name]))


@given(
    batches=few_if_compiled(st.integers(1, 5), [1, 5]).flatmap(
        lambda count: st.tuples(*[st.tuples(eighths((4, 1, 3)), eighths((4, 1, 2)))] * count)
    )
)
@pytest.mark.parametrize("gathered", [1, 8, 512])
def test_layers_with_one_position_are_summed_together(xp: Any, gathered: int, batches: Any) -> None:
    parameters = to_xp(xp, {"conv.weight": np.zeros((2, 3)), "conv.bias": np.zeros(2)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisher_module, "GATHERED", gathered)
        fisher = diagonal_fisher(taps_of(xp, batches), parameters, "empirical", samples=8)
    weight, bias = squared_gradients(*(np.concatenate(part) for part in zip(*batches, strict=True)))
    np.testing.assert_array_equal(to_numpy(fisher["conv.weight"]), weight / 8)
    np.testing.assert_array_equal(to_numpy(fisher["conv.bias"]), bias / 8)


def test_a_parameter_without_a_tap_gets_zeros_of_its_shape_and_dtype(xp: Any) -> None:
    head = xp.full((3, 2), xp.nan, dtype=xp.float32)  # The head of another task; its values do not matter.
    parameters = to_xp(xp, PARAMETERS) | {"heads.1.weight": head}
    fisher = diagonal_fisher(
        taps_of(xp, [(np.ones((1, 3, 4)), np.ones((1, 3, 2)))]), parameters, "empirical", samples=1
    )
    assert list(fisher) == list(parameters)
    assert fisher["heads.1.weight"].dtype == xp.float32
    np.testing.assert_array_equal(to_numpy(fisher["heads.1.weight"]), np.zeros((3, 2)))


def test_no_samples_is_an_error(xp: Any) -> None:
    with pytest.raises(BecameError, match=r"^the Fisher information needs at least one sample; none was given\.$"):
        diagonal_fisher([], to_xp(xp, PARAMETERS), "empirical", samples=0)


def test_an_unknown_layer_is_an_error(xp: Any) -> None:
    taps = taps_of(xp, [(np.ones((1, 3, 4)), np.ones((1, 3, 2)))])
    with pytest.raises(BecameError, match=r"^a tap belongs to 'conv\.bias', which is no parameter of the model\.$"):
        diagonal_fisher(taps, {"conv.weight": xp.zeros((2, 1, 2, 2))}, "empirical", samples=1)


def test_weights_of_samples_may_sum_to_less_than_one(xp: Any) -> None:
    """As weights of classes, for example: what the mean divides by is then below 1."""
    taps = list(taps_of(xp, [(np.ones((1, 3, 4)), np.ones((1, 3, 2)))]))
    small, whole = (diagonal_fisher(taps, to_xp(xp, PARAMETERS), "empirical", samples=s) for s in (0.25, 1))
    np.testing.assert_allclose(to_numpy(small["conv.weight"]), 4 * to_numpy(whole["conv.weight"]), rtol=1e-12)
    with pytest.raises(BecameError, match="at least one sample; none was given"):
        diagonal_fisher(taps, to_xp(xp, PARAMETERS), "empirical", samples=0)
