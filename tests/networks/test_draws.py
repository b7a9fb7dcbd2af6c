"""Initial weights and dropout masks: functions of seeds and names, the same for every framework."""

import numpy as np
import pytest

from adapters.networks import Dropout, Parameter, draw_mask, draw_masks, initial_value, initial_values

PARAMETERS = {
    "conv1.weight": Parameter((8, 3, 3, 3), 27),
    "conv1.bias": Parameter((8,), 27),
    "bn1.weight": Parameter((8,), None),
    "bn1.bias": Parameter((8,), None),
    "bn1.running_mean": Parameter((8,), None),
    "bn1.running_var": Parameter((8,), None),
}


def test_they_are_a_function_of_seed_and_name() -> None:
    first, again, other = (initial_values(seed, PARAMETERS) for seed in (5, 5, 6))
    backwards = initial_values(5, dict(reversed(PARAMETERS.items())))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        np.testing.assert_array_equal(value, backwards[name])
        assert np.array_equal(value, other[name]) == name.startswith("bn1")
    assert not np.array_equal(initial_value(5, "conv2.bias", (8,), 27), first["conv1.bias"])


def test_weights_are_uniform_within_what_the_fan_in_gives_and_norms_the_identity() -> None:
    values = initial_values(0, PARAMETERS)
    for name in ("conv1.weight", "conv1.bias"):
        assert values[name].shape == PARAMETERS[name].shape
        assert np.abs(values[name]).max() <= 1 / 27**0.5
    assert np.abs(values["conv1.weight"]).max() > 0.9 / 27**0.5
    np.testing.assert_array_equal(values["bn1.weight"], np.ones(8))
    np.testing.assert_array_equal(values["bn1.bias"], np.zeros(8))
    np.testing.assert_array_equal(values["bn1.running_mean"], np.zeros(8))
    np.testing.assert_array_equal(values["bn1.running_var"], np.ones(8))


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_right_fraction_is_kept_and_the_scale_keeps_the_mean(p: float) -> None:
    layer = Dropout(p)
    mask = draw_mask((400, 501), layer.threshold, np.random.default_rng(0))
    assert mask.shape == (400, 501)
    assert abs(mask.mean() - (1 - p)) < 5e-3
    assert layer.scale == pytest.approx(1 / (1 - p), abs=1e-4)
    assert abs((mask * layer.scale).mean() - 1) < 1e-2


def test_masks_are_drawn_in_order_and_repeat_with_their_generator() -> None:
    masks = (((3, 5), 2**15), ((7,), 2**14))
    first, again, other = (draw_masks(masks, 4, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert [mask.shape for mask in first] == [(4, 3, 5), (4, 7)]
    assert all(np.array_equal(mask, same) for mask, same in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(first[0], draw_mask((4, 3, 5), 2**15, rng))
    np.testing.assert_array_equal(first[1], draw_mask((4, 7), 2**14, rng))


def test_noise_is_drawn_among_the_masks_and_is_standard_normal() -> None:
    noise, keep = draw_masks([((300,), None), ((4,), 2**15)], 20, np.random.default_rng(0))
    assert (noise.shape, keep.shape) == ((20, 300), (20, 4))
    assert keep.dtype == np.bool_
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(noise, draw_masks([((300,), None)], 20, np.random.default_rng(0))[0])
