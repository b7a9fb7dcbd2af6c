"""Linear layers constrained by their inputs, against projecting and pulling back the gradient itself."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters.torch.linear import ByInputs, constrained_inputs, plain_linear_layers
from became_core.continual import SGD, Constraint
from became_core.projection import GPM, TrustRegion


def _memory(width: int, rank: int, name: str) -> GPM:
    basis = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64))[0]
    return GPM(0.9).with_arrays({f"bases.{name}": basis, "tasks": torch.tensor(1)})


@given(
    width=st.integers(1, 6),
    outputs=st.integers(1, 4),
    rows=st.integers(1, 5),
    rank=st.integers(0, 6),
    positions=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_projecting_inputs_projects_the_gradient(
    width: int, outputs: int, rows: int, rank: int, positions: bool, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(width, outputs, bias=bias).double()
    memory = _memory(width, min(rank, width), "fc.weight")
    inputs = torch.randn((rows, 3, width) if positions else (rows, width), dtype=torch.float64, requires_grad=True)
    leaves = [inputs, *layer.parameters()]
    plain_output = layer(inputs)
    plain = torch.autograd.grad(plain_output.square().sum(), leaves)
    with constrained_inputs({layer: "fc"}, Constraint(frozenset(), projector=memory), SGD()) as done:
        output = layer(inputs)
        projected = torch.autograd.grad(output.square().sum(), leaves)
    assert done == ByInputs(frozenset({"fc.weight"}))
    assert torch.equal(output, plain_output)
    torch.testing.assert_close(projected[0], plain[0])
    torch.testing.assert_close(projected[1], memory.project({"fc.weight": plain[1]})["fc.weight"], rtol=0, atol=1e-10)
    if bias:
        torch.testing.assert_close(projected[2], plain[2])


@given(
    width=st.integers(2, 6),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    positions=st.booleans(),
    projects=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_trust_region_by_inputs_is_that_of_effective_weights(
    width: int, ranks: list[int], positions: bool, projects: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(width, 3).double()
    memory = _memory(width, max(1, width // 2), "fc.weight")
    keys = [f"fc.weight@{task}" for task in range(len(ranks))]
    basis = memory.bases["fc.weight"]  # a task's own lies within
    bases = {key: basis[:, : min(rank, basis.shape[1])] for key, rank in zip(keys, ranks, strict=True)}
    scales = {
        key: torch.randn(each.shape[1], each.shape[1], dtype=torch.float64, requires_grad=True)
        for key, each in bases.items()
    }
    region = TrustRegion(bases, scales)
    inputs = torch.randn((5, 3, width) if positions else (5, width), dtype=torch.float64, requires_grad=True)
    effective = region.effective({"fc.weight": layer.weight})["fc.weight"]
    expected_output = nn.functional.linear(inputs, effective, layer.bias)
    leaves = [inputs, layer.weight, *scales.values()]
    constraint = Constraint(frozenset(), projector=memory if projects else None, region=region)
    expected = torch.autograd.grad(expected_output.square().sum(), leaves)
    with constrained_inputs({layer: "fc"}, constraint, SGD(), region) as done:
        output = layer(inputs)
        found = torch.autograd.grad(output.square().sum(), leaves)
    assert done == ByInputs(frozenset({"fc.weight"} if projects else ()), frozenset({"fc.weight"}))
    by_weight = memory.project({"fc.weight": expected[1]})["fc.weight"] if projects else expected[1]
    for one, other in zip((output, *found), (expected_output, expected[0], by_weight, *expected[2:]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_nothing_is_left_behind_and_unknown_layers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    known, unknown = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    constraint = Constraint(frozenset(), projector=_memory(3, 2, "fc.weight"))
    with constrained_inputs({known: "fc", unknown: "other"}, constraint, SGD()) as done:
        assert done == ByInputs(frozenset({"fc.weight"}))
        assert "forward" not in vars(unknown)
    assert "forward" not in vars(known)
    with constrained_inputs({known: "fc"}, Constraint(frozenset()), SGD()) as done:
        assert not any(done)


class _Mixed(nn.Module):
    """Linear layers, some of whose weights are used beside them while they train."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.dropped, self.beside, self.patched = (nn.Linear(3, 3) for _ in range(4))
        self.pruned = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.norm = nn.BatchNorm1d(3)
        own: Any = self.patched.forward
        self.patched.forward = lambda x: own(x) * 2  # type: ignore[method-assign, assignment]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = nn.functional.linear(x, nn.functional.dropout(self.dropped.weight, 0.5))
        else:
            x = self.dropped(x)
        x = self.beside(self.plain(self.plain(x).tanh())) @ self.beside.weight
        outputs: Tensor = self.pruned(self.patched(self.norm(x)))
        return outputs


def test_plain_linear_layers_are_those_whose_weights_nothing_else_uses() -> None:
    torch.manual_seed(0)
    network: Any = _Mixed().train()
    patched = network.patched.forward
    state, random = {name: value.clone() for name, value in network.state_dict().items()}, torch.random.get_rng_state()
    names = {module: name for name, module in network.named_modules()}
    assert plain_linear_layers(network, names, (torch.randn(3, 3, generator=torch.Generator()),)) == {network.plain}
    assert torch.equal(torch.random.get_rng_state(), random)
    assert network.training
    assert network.patched.forward is patched
    assert "forward" not in vars(network.plain)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])
