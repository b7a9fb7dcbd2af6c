"""Initial weights: a function of seed and name, in the range of PyTorch's own."""

import numpy as np

from adapters.networks import Parameter, initial_value, initial_values

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
