"""A process's share of the work, by ``torch.distributed``: sums over all processes, and parts of training batches.

A training batch is divided by its samples. All else that a described network computes is a sample's own, but for batch
norm, which takes the mean and variance of the whole batch, and dropout, whose masks are drawn for the whole batch. So
the sum of the processes' gradients is that of the whole batch, whatever the number of processes.

Convention: variances are biased. ``total`` sums all arrays of a call by one all-reduce for each of their dtypes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from adapters.backend import LostProcessError
from adapters.torch.layers import is_batch_norm, moments
from adapters.torch.networks import Drawing
from became_core.arrays import Params
from became_core.continual import Share
from became_core.continual.data import Indices

__all__ = ["ProcessShare", "divided"]


@dataclass(frozen=True)
class ProcessShare(Share):
    """A process's share of the work of all processes of a group.

    Attributes:
        timeout: the seconds that the group waits for an answer, for messages.
        group: the processes; all if None.
    """

    timeout: float = 60.0
    group: Any = field(default=None, compare=False)

    def reduce(self, numbers: Tensor) -> Tensor:
        """Sum numbers over all processes, in place.

        Raises:
            LostProcessError: if another process ended or did not answer.
        """
        try:
            distributed.all_reduce(numbers, group=self.group)
        except RuntimeError as error:
            raise LostProcessError(self.count, self.timeout) from error
        return numbers

    @torch.no_grad()
    def total(self, sums: Params) -> Params:
        """Return the sums over all processes, in the layouts of this process's arrays."""
        whole: Params = {}
        for dtype in sorted({value.dtype for value in sums.values()}, key=str):
            names = sorted(name for name, value in sums.items() if value.dtype == dtype)
            numbers = self.reduce(torch.cat([sums[name].reshape(-1) for name in names]))
            parts = torch.split(numbers, [sums[name].numel() for name in names])
            for name, part in zip(names, parts, strict=True):
                whole[name] = torch.empty_like(sums[name]).copy_(part.view(sums[name].shape))
        return {name: whole[name] for name in sums}

    @torch.no_grad()
    def joined(self, rows: Tensor, places: Indices | None = None) -> Tensor:
        """Return the rows of all processes: the sum of arrays in which each process has put its own rows."""
        counts = torch.zeros(self.count, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        sizes = self.reduce(counts).tolist()
        if places is None:
            places = np.arange(len(rows)) + sum(sizes[: self.rank])
        whole = rows.new_zeros((sum(sizes), *rows.shape[1:]))
        whole[torch.from_numpy(places).to(rows.device)] = rows
        return self.reduce(whole)


@contextmanager
def divided(network: nn.Module, share: Share, samples: int) -> Iterator[None]:
    """Let forward passes see a process's own samples of a batch, for the time of this context.

    Args:
        network: a described network, in training mode.
        share: of this process; of one that works alone nothing is changed.
        samples: how many the batch has in all processes.
    """
    if not isinstance(share, ProcessShare) or not share.divides(samples):
        yield
        return
    norms: list[Any] = [module for module in network.modules() if is_batch_norm(module)]
    dropouts: list[Any] = [module for module in network.modules() if isinstance(module, Drawing)]
    for norm in norms:
        vars(norm)["forward"] = partial(_normalised, norm, share)  # is found before the class's own
    for dropout in dropouts:
        dropout.part = samples, share.rows(samples)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]
        for dropout in dropouts:
            dropout.part = None


def _normalised(norm: Any, share: ProcessShare, inputs: Tensor) -> Tensor:
    result: Tensor = _WholeBatchNorm.apply(  # type: ignore[no-untyped-call]
        inputs, norm.weight, norm.bias, norm.eps, share
    )
    return result


class _WholeBatchNorm(torch.autograd.Function):
    """Batch norm by the mean and variance of the whole batch: one all-reduce forward, and one backward."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, share: ProcessShare
    ) -> Tensor:
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        count = inputs.numel() // inputs.shape[1]
        parts = wide.new_zeros(share.count, 3, inputs.shape[1])
        own_mean, own_variance = moments(wide)
        parts[share.rank] = torch.stack([torch.full_like(own_mean, count), own_mean, own_variance])
        counts, means, variances = share.reduce(parts).unbind(1)
        total = counts.sum(0)
        mean = (counts / total * means).sum(0)
        # The squares are of differences from the mean; E[x^2] - E[x]^2 would cancel where the variance is small.
        variance = (counts / total * (variances + (means - mean).square())).sum(0)
        scale = (variance + epsilon).rsqrt()
        ctx.save_for_backward(inputs, weight, mean, scale)
        ctx.total, ctx.share, ctx.has_bias = total, share, bias is not None
        result = nn.functional.batch_norm(wide, mean, variance, weight, bias, False, 0.0, epsilon)
        return result.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale = ctx.saved_tensors
        shape = 1, -1, *[1] * (inputs.ndim - 2)
        others = [axis for axis in range(inputs.ndim) if axis != 1]
        gradient = gradients[0].to(mean.dtype)
        normal = (inputs.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        by_bias, by_weight = gradient.sum(others), (gradient * normal).sum(others)
        sums = ctx.share.reduce(torch.stack([by_bias, by_weight])) / ctx.total
        onwards = gradient - sums[0].view(shape) - normal * sums[1].view(shape)
        factor = scale if weight is None else scale * weight
        return (
            (onwards * factor.view(shape)).to(inputs.dtype),
            None if weight is None else by_weight.to(weight.dtype),
            by_bias if ctx.has_bias else None,
            None,
            None,
        )
