"""Linear layers that do by the rows of a batch's inputs what a constraint asks of their weights.

The gradient of a linear layer's weight is g^T a, so projecting the inputs a, [rows, d_in], gives the projected gradient
for the work of a few rows instead of d_out of them, whatever the rank of the protected space. Likewise the effective
weight of a trust region, W (I + S), on a is W on a + S a, and differentiating that gives the gradients by W and by the
region's scales.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapters.backend import projected_by_rows
from adapters.torch.graph import Graph, Use, graph_of
from adapters.torch.layers import buffers_kept
from became_core.continual import Constraint, Optimiser
from became_core.projection import Projector, Region

__all__ = ["ByInputs", "constrained_inputs", "plain_linear_layers"]


class ByInputs(NamedTuple):
    """Names of weights of which the constraint is met already.

    Attributes:
        projected: those whose gradients come out projected.
        beneath: those of a region whose gradients come out by the weight beneath, W.
    """

    projected: frozenset[str] = frozenset()
    beneath: frozenset[str] = frozenset()


class _ProjectedLinear(torch.autograd.Function):
    """``inputs @ weight.T + bias``, in whose backward pass the weight's gradient sees projected inputs."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, name: str, projector: Projector
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.has_bias, ctx.name, ctx.projector = bias is not None, name, projector
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inputs, weight = ctx.saved_tensors
        # Under autocast what flows has less precision than the weight, whose gradient is made in the weight's own.
        rows = gradient.reshape(-1, gradient.shape[-1]).to(weight.dtype)
        seen = ctx.projector.project_rows(ctx.name, inputs.reshape(-1, inputs.shape[-1]).to(weight.dtype))
        onwards = (gradient @ weight.to(gradient.dtype)).to(inputs.dtype)
        return onwards, rows.T @ seen, rows.sum(0) if ctx.has_bias else None, None, None


def plain_linear_layers(network: nn.Module, names: dict[nn.Module, str], arguments: tuple[Any, ...]) -> set[nn.Module]:
    """Return the linear layers whose weights are used by nothing but the layers' own forward passes, in training.

    Only of these can what a constraint asks of the weight be done by the rows of inputs. In another layer the weight
    may be dropped out, normalised, tied or multiplied beside it, or its ``forward`` may be the user's own.

    Args:
        network: what runs, in training mode; its buffers and PyTorch's random numbers are left as they were.
        names: all its modules by canonical name.
        arguments: of the network.
    """
    layers = {
        module: name
        for module, name in names.items()
        if type(module) is nn.Linear
        and "forward" not in vars(module)
        and dict(module.named_parameters()).get("weight") is not None
    }
    own: dict[nn.Module, set[Any]] = {module: set() for module in layers}

    def forward(module: nn.Linear, inputs: Tensor) -> Tensor:
        output = nn.functional.linear(inputs, module.weight, module.bias)
        own[module].add(output.grad_fn)
        return output

    try:
        for module in layers:
            vars(module)["forward"] = partial(forward, module)
        with buffers_kept(network), torch.random.fork_rng(devices=[]), torch.enable_grad():
            graph = graph_of(network(*arguments), {name: module.weight for module, name in layers.items()})
    finally:
        for module in layers:
            del vars(module)["forward"]
    plain: set[nn.Module] = set()
    for module, name in layers.items():
        nodes = {use.node for use in graph.uses.get(name, ()) if isinstance(use, Use) and use.kind == "matrix"}
        if nodes and len(nodes) == len(graph.uses[name]) and all(_leads_to(node, own[module], graph) for node in nodes):
            plain.add(module)
    return plain


def _leads_to(node: Any, outputs: set[Any], graph: Graph) -> bool:
    """Whether a node is one of these, or reaches one by views and the addition of a bias alone."""
    while node not in outputs:
        above = graph.consumers.get(node, ())
        if len(above) != 1 or above[0][0].name() not in ("ViewBackward0", "UnsafeViewBackward0", "AddBackward0"):
            return False
        node = above[0][0]
    return True


@contextmanager
def constrained_inputs(
    layers: dict[nn.Module, str],
    constraint: Constraint,
    optimiser: Optimiser,
    region: Region | None = None,
    forwards: dict[str, Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[ByInputs]:
    """Let linear layers project their gradients, and work in a region, for the time of this context.

    Args:
        layers: those of ``plain_linear_layers`` by canonical name.
        constraint: of the stage.
        optimiser: of the stage.
        region: the constraint's, with the scales that gradients reach and that steps change in place.
        forwards: what the layers run, by their weights' names, as an earlier call with the same constraint has left it
            here; without it new functions are made.
    """
    forwards = {} if forwards is None else forwards
    linear = {f"{name}.weight": module for module, name in layers.items()}
    beneath = frozenset[str]() if region is None else region.rowwise & linear.keys()
    projected = projected_by_rows(constraint, optimiser, linear.keys(), beneath)
    changed: list[tuple[str, Any]] = [(name, linear[name]) for name in projected | beneath]
    for name, module in changed:
        chosen = constraint.projector if name in projected else None, region if name in beneath else None
        forward = forwards.setdefault(name, partial(_forward, module, name, *chosen))
        vars(module)["forward"] = forward  # is found before the class's own
    try:
        yield ByInputs(projected, beneath)
    finally:
        for _, module in changed:
            del vars(module)["forward"]


def _forward(
    module: nn.Linear, name: str, projector: Projector | None, region: Region | None, inputs: Tensor
) -> Tensor:
    if region is not None:
        inputs = region.inputs_beneath(name, inputs)
    if projector is None:
        return nn.functional.linear(inputs, module.weight, module.bias)
    result: Tensor = _ProjectedLinear.apply(  # type: ignore[no-untyped-call]
        inputs, module.weight, module.bias, name, projector
    )
    return result
