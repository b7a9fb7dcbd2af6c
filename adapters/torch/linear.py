"""Linear layers that do by the rows of a batch's inputs what a constraint asks of their weights.

The gradient of a linear layer's weight is g^T a, so projecting the inputs a, [rows, d_in], gives the projected gradient
for the work of a few rows instead of d_out of them, whatever the rank of the protected space. Likewise the effective
weight of a trust region, W (I + S), on a is W on a + S a, and differentiating that gives the gradients by W and by the
region's scales.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapters.backend import projected_by_rows
from became_core.continual import Constraint, Optimiser
from became_core.projection import Projector, Region

__all__ = ["ByInputs", "constrained_inputs"]


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


@contextmanager
def constrained_inputs(
    layers: dict[nn.Module, str], constraint: Constraint, optimiser: Optimiser, region: Region | None = None
) -> Iterator[ByInputs]:
    """Let linear layers project their gradients, and work in a region, for the time of this context.

    Args:
        layers: the modules by canonical name.
        constraint: of the stage.
        optimiser: of the stage.
        region: the constraint's, with the scales that gradients reach and that steps change in place.
    """
    linear = {f"{name}.weight": module for module, name in layers.items() if type(module) is nn.Linear}
    beneath = frozenset[str]() if region is None else region.rowwise & linear.keys()
    projected = projected_by_rows(constraint, optimiser, linear.keys(), beneath)
    changed = [(name, linear[name]) for name in projected | beneath]
    for name, module in changed:
        chosen = constraint.projector if name in projected else None, region if name in beneath else None
        vars(module)["forward"] = partial(_forward, module, name, *chosen)  # is found before the class's own
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
