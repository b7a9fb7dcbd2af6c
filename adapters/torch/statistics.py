"""Batch norms whose statistics are constants of the forward pass, so that per-sample gradients exist; running ones.

Convention: a batch norm that keeps no running statistics takes each batch's own in evaluation too, and their gradients
couple the samples; here they are computed beforehand, without gradient. Variances are biased, as batch norm has them.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BATCH_NORMS", "Statistics", "batch_statistics", "constant_statistics", "statistics"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# By module, the mean and variance of each of its runs in one pass.
Statistics = dict[nn.Module, list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of each channel, of inputs [N, C, ...]."""
    # Batch norm's own way to them; ``Tensor.var`` takes a hundred times as long on a CPU.
    mean, variance = torch.batch_norm_update_stats(inputs, None, None, 0.0)
    return mean, variance


@torch.no_grad()
def batch_statistics(network: nn.Module, norms: Collection[nn.Module], inputs: Tensor) -> Statistics:
    """Return the statistics of these batch norms' inputs, each normalising by the batch's own, without dropout.

    Args:
        network: what runs; it is left in evaluation mode.
        norms: of the network, with a momentum of 0, so that running statistics stay as they are.
        inputs: of the network.
    """
    found: Statistics = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.setdefault(module, []).append(statistics(inputs[0]))

    network.eval()
    handles = [module.train().register_forward_pre_hook(note) for module in norms]
    try:
        network(inputs)
    finally:
        for handle in handles:
            handle.remove()
        network.eval()
    return found


@contextmanager
def constant_statistics(network: nn.Module, known: Statistics | None = None) -> Iterator[Statistics]:
    """Let batch norms without running statistics treat each batch's as constants, for the time of this context.

    Args:
        network: its batch norms are those meant; it is in evaluation mode.
        known: if given, the statistics to use, run by run, instead of the batch's.

    Yields:
        The statistics used in the passes of this context.
    """
    used: Statistics = {}

    def fix(module: Any, inputs: tuple[Tensor, ...]) -> None:
        runs = used.setdefault(module, [])
        runs.append(statistics(inputs[0].detach()) if known is None else known[module][len(runs)])
        module.running_mean, module.running_var = runs[-1]

    modules: list[Any] = [
        module for module in network.modules() if isinstance(module, BATCH_NORMS) and not module.track_running_stats
    ]
    handles = [module.register_forward_pre_hook(fix) for module in modules]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            module.running_mean = module.running_var = None
