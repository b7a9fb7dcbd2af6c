"""Taps of every known layer, held against autograd a sample at a time."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters.torch.layers import constant_statistics, estimate_statistics, moments
from became_core import BecameError
from became_core.curvature import per_sample_gradients
from tests.torch.oracle import assert_exact, autograd_gradients, taps_of

CLASSES = 3


def _closed(*layers: nn.Module, samples: Tensor) -> nn.Module:
    """Layers with a head, in double precision and evaluation mode."""
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES)).double().eval()
    network(samples)
    return network


def _labels(samples: Tensor) -> Tensor:
    return torch.randint(0, CLASSES, (len(samples),))


@given(
    depth=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    widths=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    batch=st.integers(1, 5),
    bias=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_convolutions(
    depth: int,
    kernel: int,
    stride: int,
    padding: int | str,
    mode: Any,
    dilation: int,
    groups: int,
    widths: tuple[int, int],
    batch: int,
    bias: bool,
    channels_last: bool,
    seed: int,
) -> None:
    assume(padding != "same" or stride == 1)
    torch.manual_seed(seed)
    layer = (nn.Conv1d, nn.Conv2d)[depth - 1](
        groups * widths[0],
        groups * widths[1],
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=bias,
        padding_mode=mode,
    )
    samples = torch.randn(batch, groups * widths[0], *(7, 6)[:depth], dtype=torch.float64)
    if channels_last and depth == 2:
        samples = samples.contiguous(memory_format=torch.channels_last)
    network = _closed(layer, nn.Tanh(), samples=samples)
    assert_exact(network, samples, _labels(samples))


@given(
    positions=st.lists(st.integers(1, 3), max_size=2),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear_layers(positions: list[int], widths: tuple[int, int], batch: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    samples = torch.randn(batch, *positions, widths[0], dtype=torch.float64)
    network = _closed(nn.Linear(*widths, bias=bias), nn.Tanh(), samples=samples)
    assert_exact(network, samples, _labels(samples))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(4), (5, 4)),
        (nn.LayerNorm((3, 4), bias=False), (5, 3, 4)),
        (nn.RMSNorm(4), (5, 4)),
        (nn.RMSNorm((3, 4), eps=0.1), (3, 4)),
        (nn.GroupNorm(2, 4), (4, 3, 2)),
        (nn.InstanceNorm1d(4, affine=True), (4, 5)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 2)),
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 5)),
        (nn.BatchNorm2d(4), (4, 3, 2)),
        (nn.BatchNorm3d(4), (4, 3, 2, 2)),
        (nn.Conv3d(2, 3, 2, padding=1), (2, 3, 2, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(len(value)),
)
def test_normalisation_layers_and_others(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    samples = torch.randn(6, *shape, dtype=torch.float64)
    layer.double()
    with torch.no_grad():  # scales and running statistics of their own
        for parameter in layer.parameters():
            parameter.normal_()
        layer.train()
        layer(samples * 2 + 1)
    network = _closed(layer, nn.Tanh(), samples=samples)
    assert_exact(network, samples, _labels(samples))


@given(
    positions=st.integers(1, 6),
    size=st.integers(1, 4),
    padded=st.booleans(),
    batch=st.integers(1, 4),
    seed=st.integers(),
)
def test_embeddings(positions: int, size: int, padded: bool, batch: int, seed: int) -> None:
    """With few words and many places, most words come repeatedly in a sample."""
    torch.manual_seed(seed)
    samples = torch.randint(0, size, (batch, positions))
    network = _closed(nn.Embedding(size, 2, padding_idx=0 if padded else None), nn.Tanh(), samples=samples)
    assert_exact(network, samples, _labels(samples))


def test_per_sample_gradients_are_autograds() -> None:
    torch.manual_seed(0)
    samples = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    layers = nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 3, 2, stride=2)
    network, labels = _closed(*layers, samples=samples), _labels(samples)
    (taps,) = taps_of(network, samples, labels)
    found, expected = per_sample_gradients(taps), autograd_gradients(network, samples, labels)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].reshape(gradient.shape), gradient, rtol=1e-9, atol=1e-13)


def _network() -> nn.Sequential:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh())
    return network.double().eval()


def test_statistics_are_the_mean_and_the_biased_variance_of_each_channel() -> None:
    torch.manual_seed(0)
    for shape in ((5, 3), (5, 3, 4), (5, 3, 4, 2)):
        inputs = torch.randn(*shape, dtype=torch.float64) + 3
        mean, variance = moments(inputs)
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
    frozen_norm.running_mean, frozen_norm.running_var = moments(layers[0](images).detach())
    frozen = nn.Sequential(layers[0], frozen_norm, *layers[2:]).eval()
    assert_exact(frozen, images, labels)
    (taps,) = taps_of(network, images, labels)
    expected = autograd_gradients(frozen, images, labels)
    for name, gradient in per_sample_gradients(taps).items():
        torch.testing.assert_close(gradient.reshape(expected[name].shape), expected[name], rtol=1e-9, atol=1e-14)


def test_running_statistics_stay_where_no_batch_or_a_single_sample_cannot_give_new_ones() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(6, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches: list[list[Tensor]] = [[], [torch.randn(5, 3), torch.randn(1, 3)]]
    for inputs, message in zip(
        batches, ("there is no batch to estimate", "are as they were: Expected more"), strict=True
    ):
        with pytest.raises(BecameError, match=message):
            estimate_statistics(model, [partial(model, batch) for batch in inputs])
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        assert all(module.training for module in model.modules())
