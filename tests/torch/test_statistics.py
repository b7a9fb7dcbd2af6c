"""Batch statistics held constant."""

import torch
from torch import nn

from adapters.torch.statistics import constant_statistics, statistics
from became_core.curvature import per_sample_gradients
from tests.torch.oracle import assert_exact, autograd_gradients, taps_of


def _network() -> nn.Sequential:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh())
    return network.double().eval()


def test_statistics_are_the_mean_and_the_biased_variance_of_each_channel() -> None:
    torch.manual_seed(0)
    for shape in ((5, 3), (5, 3, 4), (5, 3, 4, 2)):
        inputs = torch.randn(*shape, dtype=torch.float64) + 3
        mean, variance = statistics(inputs)
        rows = inputs.movedim(1, -1).reshape(-1, 3)
        torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(variance, rows.var(0, unbiased=False))


def test_constant_statistics_keep_the_output_and_decouple_the_samples() -> None:
    torch.manual_seed(0)
    network, images = _network(), torch.randn(6, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    plain = network(images)
    (coupled,) = torch.autograd.grad(plain[0].square().sum(), images)
    with constant_statistics(network) as used:
        frozen = network(images)
    (decoupled,) = torch.autograd.grad(frozen[0].square().sum(), images)
    torch.testing.assert_close(frozen, plain)
    assert coupled[1:].abs().max() > 1e-3
    assert decoupled[1:].abs().max() == 0
    assert decoupled[0].abs().max() > 1e-3
    torch.testing.assert_close(network(images), plain)  # and nothing of it is left
    with constant_statistics(network, used):  # a sample alone, as it was among the others
        torch.testing.assert_close(network(images[:1]), plain[:1])


def test_fisher_with_constant_batch_statistics_is_that_of_a_frozen_copy() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 3)
    network = nn.Sequential(*layers).double().eval()
    frozen_norm = nn.BatchNorm2d(3).double()
    frozen_norm.running_mean, frozen_norm.running_var = statistics(layers[0](images).detach())
    frozen = nn.Sequential(layers[0], frozen_norm, *layers[2:]).eval()
    assert_exact(frozen, images, labels)
    (taps,) = taps_of(network, images, labels)
    expected = autograd_gradients(frozen, images, labels)
    for name, gradient in per_sample_gradients(taps).items():
        torch.testing.assert_close(gradient.reshape(expected[name].shape), expected[name], rtol=1e-9, atol=1e-14)
