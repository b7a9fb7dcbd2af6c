"""Linear layers projected by their inputs, against projecting the gradient itself."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapters.torch.projected import projected_inputs
from became_core.projection import GPM


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
    with projected_inputs({layer: "fc"}, memory) as done:
        output = layer(inputs)
        projected = torch.autograd.grad(output.square().sum(), leaves)
    assert done == {"fc.weight"}
    assert torch.equal(output, plain_output)
    torch.testing.assert_close(projected[0], plain[0])
    torch.testing.assert_close(projected[1], memory.project({"fc.weight": plain[1]})["fc.weight"], rtol=0, atol=1e-10)
    if bias:
        torch.testing.assert_close(projected[2], plain[2])


def test_nothing_is_left_behind_and_unknown_layers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    known, unknown = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    with projected_inputs({known: "fc", unknown: "other"}, _memory(3, 2, "fc.weight")) as done:
        assert done == {"fc.weight"}
        assert "forward" not in vars(unknown)
    assert "forward" not in vars(known)
    with projected_inputs({known: "fc"}, None) as done:
        assert not done
