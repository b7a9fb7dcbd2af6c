"""Linear layers whose weight gradient is projected as it is made.

The gradient of a linear layer's weight is g^T a, so projecting the batch's inputs a, [rows, d_in], gives the projected
gradient for the work of a few rows instead of d_out of them, whatever the rank of the protected space.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from became_core.projection import Projector

__all__ = ["projected_inputs"]


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
def projected_inputs(layers: dict[nn.Module, str], projector: Projector | None) -> Iterator[frozenset[str]]:
    """Project the gradients of linear layers by their inputs for the time of this context.

    Args:
        layers: the modules by canonical name.
        projector: what projects; nothing happens without one.

    Yields:
        The names of the weights whose gradients come out projected.
    """
    if projector is None:
        yield frozenset()
        return
    linear = {
        f"{name}.weight": module
        for module, name in layers.items()
        if type(module) is nn.Linear and f"{name}.weight" in projector.rowwise
    }
    for name, module in linear.items():
        vars(module)["forward"] = partial(_forward, module, name, projector)  # shows before the class's own
    try:
        yield frozenset(linear)
    finally:
        for module in linear.values():
            del vars(module)["forward"]


def _forward(module: nn.Linear, name: str, projector: Projector, inputs: Tensor) -> Tensor:
    result: Tensor = _ProjectedLinear.apply(  # type: ignore[no-untyped-call]
        inputs, module.weight, module.bias, name, projector
    )
    return result
