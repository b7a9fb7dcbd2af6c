"""Taps of PyTorch layers, held against per-sample autograd."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch.tapping import collect_taps, constant_statistics
from became_core import BecameError
from became_core.curvature import diagonal_fisher


def _per_sample_squares(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The mean over samples of squared gradients, a sample at a time by torch.func: the oracle."""
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def loss(theta: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(torch.func.functional_call(network, theta, (image[None],)), label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    return {name: gradient.square().mean(0) for name, gradient in gradients.items()}


def _from_taps(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    names = {module: name for name, module in network.named_modules()}
    taps = collect_taps(network, names, lambda: functional.cross_entropy(network(images), labels, reduction="sum"))
    return diagonal_fisher([taps], dict(network.named_parameters()), "empirical")


@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fisher_of_a_convolutional_network_equals_per_sample_autograd(
    kernel: int, stride: int, padding: int, dilation: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(4, bias=bias),
    )
    images, labels = torch.randn(5, 2, 7, 6), torch.randint(0, 4, (5,))
    network(images)
    network.double()
    expected = _per_sample_squares(network, images.double(), labels)
    found = _from_taps(network, images.double(), labels)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-14)


def test_fisher_of_normalisation_layers_equals_per_sample_autograd_with_running_statistics() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5), nn.BatchNorm1d(5)
    ).double()
    images, labels = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randint(0, 5, (6,))
    network.train()
    network(images)  # gives the running statistics values of their own
    network.eval()
    expected, found = _per_sample_squares(network, images, labels), _from_taps(network, images, labels)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-14)


def test_constant_statistics_keep_the_output_and_decouple_the_samples() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double().eval()
    images = torch.randn(6, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    plain = network(images)
    (coupled,) = torch.autograd.grad(plain[0].square().sum(), images)
    with constant_statistics(network):
        frozen = network(images)
    (decoupled,) = torch.autograd.grad(frozen[0].square().sum(), images)
    torch.testing.assert_close(frozen, plain)
    assert coupled[1:].abs().max() > 1e-3
    assert decoupled[1:].abs().max() == 0
    assert decoupled[0].abs().max() > 1e-3
    torch.testing.assert_close(network(images), plain)  # and nothing of it is left


def test_fisher_with_constant_batch_statistics_equals_autograd_through_a_frozen_copy() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 3)
    )
    network.double().eval()
    before = network[0](images)
    frozen = nn.Sequential(network[0], nn.BatchNorm2d(3), network[2], network[3]).double().eval()
    frozen[1].load_state_dict(
        {
            **network[1].state_dict(),
            "running_mean": before.mean((0, 2, 3)),
            "running_var": before.var((0, 2, 3), unbiased=False),
        },
        strict=False,
    )
    with constant_statistics(network):
        found = _from_taps(network, images, labels)
    expected = _per_sample_squares(frozen, images, labels)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-14)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.fc(self.fc(inputs))
        return result


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Bilinear(4, 4, 3)), "do not know the layer '0', a Bilinear"),
        (lambda: _Twice(), "the layer 'fc' runs twice"),
        (lambda: nn.Conv2d(4, 4, 1, groups=2), "one group"),
    ],
)
def test_layers_that_taps_cannot_serve_are_named(build: Callable[[], nn.Module], message: str) -> None:
    network = build()
    names = {module: name for name, module in network.named_modules()}

    def forward() -> Tensor:
        inputs = torch.randn(2, 4, 3, 3) if isinstance(network, nn.Conv2d) else torch.randn(2, 4)
        outputs: Tensor = network[0](inputs, inputs) if isinstance(network, nn.Sequential) else network(inputs)
        return outputs.sum()

    with pytest.raises(BecameError, match=message):
        collect_taps(network, names, forward)
