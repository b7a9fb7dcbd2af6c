"""Derivatives along directions, by every way, against a dense Jacobian or a difference in double precision."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import derivatives
from adapters.torch.derivatives import Derivatives


class _NoDerivative(torch.autograd.Function):
    """A function with a backward pass, and no derivative of it in any mode."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        result: Tensor = gradients[0] * inputs.cos()
        return result


class _Sine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = _NoDerivative.apply(self.fc(inputs.mean(1)))  # type: ignore[no-untyped-call]
        return outputs


class _Last(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.cell(inputs)[0]
        return outputs[:, -1]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        q, k, v = self.qkv(inputs).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).flatten(1)


WAYS: tuple[derivatives.Way, ...] = ("forward mode", "two reverse passes", "difference")

NETWORKS: dict[str, tuple[Any, str | None]] = {
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), "forward mode"),
    "an encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True), "forward mode"),
    "attention": (_Attention, "forward mode"),
    "weight norm": (
        lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(12, 3))),
        "two reverse passes",
    ),
    "an LSTM": (lambda: _Last(nn.LSTM(4, 3, batch_first=True)), None),
    "a GRU": (lambda: _Last(nn.GRU(4, 3, batch_first=True)), None),
    "a function without derivatives": (_Sine, "difference"),
    "a compiled network": (
        lambda: torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), backend="eager"),
        "forward mode",
    ),
}


def _problem(case: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    network: Any = NETWORKS[case][0]()
    network = network.to(dtype).eval()
    inputs = torch.randn(5, 3, 4, dtype=torch.float64).to(dtype)
    theta = {name: value.detach() for name, value in network.named_parameters()}
    direction = {name: torch.randn(value.shape, dtype=torch.float64).to(dtype) for name, value in theta.items()}

    def function(moved: Mapping[str, Tensor]) -> Tensor:
        outputs: Tensor = torch.func.functional_call(network, dict(moved), (inputs,))
        return outputs

    return function, theta, direction


@pytest.mark.parametrize("case", NETWORKS)
def test_every_network_has_its_derivative(case: str) -> None:
    function, theta, direction = _problem(case, torch.float64)
    finder = Derivatives()
    twice = {name: 2 * value for name, value in direction.items()}
    outputs, tangents = finder.along(function, theta, [direction, twice])
    step = 1e-5
    moved = [{name: value + sign * step * direction[name] for name, value in theta.items()} for sign in (1, -1)]
    with torch.no_grad():
        torch.testing.assert_close(outputs, function(theta))
        expected = (function(moved[0]) - function(moved[1])) / (2 * step)
    torch.testing.assert_close(tangents[0], expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(tangents[1], 2 * expected, rtol=1e-7, atol=1e-8)
    assert NETWORKS[case][1] in (None, finder.way)


@pytest.mark.parametrize("case", NETWORKS)
def test_the_difference_is_near_in_single_precision(case: str) -> None:
    function, theta, direction = _problem(case, torch.float64)
    _, exact = Derivatives().along(function, theta, [direction])
    function, theta, direction = _problem(case, torch.float32)
    _, tangents = Derivatives("difference").along(function, theta, [direction])
    assert float((tangents.double() - exact).norm()) < 2e-3 * float(exact.norm())


def test_the_ways_agree_and_a_parameter_without_a_direction_stays() -> None:
    function, theta, direction = _problem("an encoder", torch.float64)
    part = {name: value for name, value in direction.items() if "linear1" in name}
    tangents = [
        Derivatives(way).along(function, theta, [part])[1]
        for way in ("forward mode", "two reverse passes", "difference")
    ]
    torch.testing.assert_close(tangents[1], tangents[0])
    torch.testing.assert_close(tangents[2], tangents[0], rtol=1e-6, atol=1e-7)
    whole = {name: part.get(name, torch.zeros_like(value)) for name, value in theta.items()}
    torch.testing.assert_close(Derivatives().along(function, theta, [whole])[1], tangents[0])


@pytest.mark.parametrize("way", WAYS)
def test_no_step_has_no_derivative(way: derivatives.Way) -> None:
    function, theta, direction = _problem("linear", torch.float64)
    nowhere = {name: value * 0 for name, value in direction.items()}
    assert not Derivatives(way).along(function, theta, [nowhere])[1].any()
    assert not Derivatives(way).along(function, theta, [{}])[1].any()
