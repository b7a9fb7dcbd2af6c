"""Batch norms whose statistics are constants of the forward pass, so that per-sample gradients exist; running ones.

Convention: a batch norm that keeps no running statistics takes each batch's own in evaluation too, and their gradients
couple the samples; here they are computed beforehand, without gradient. Variances are biased, as batch norm has them.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BATCH_NORMS", "Statistics", "batch_statistics", "constant_statistics", "running_norms", "statistics"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# By module, the mean and variance of each of its runs in one pass.
Statistics = dict[nn.Module, list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of each channel, of inputs [N, C, ...]."""
    # Batch norm's own way to them; ``Tensor.var`` takes a hundred times as long on a CPU.
    mean, variance = torch.batch_norm_update_stats(inputs, None, None, 0.0)
    return mean, variance


def running_norms(names: Mapping[nn.Module, str]) -> dict[nn.Module, str]:
    """Return the batch norms that have running statistics, of modules by name; training changes these no more."""
    found: dict[nn.Module, str] = {}
    for module, name in names.items():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            module.momentum = 0.0
            found[module] = name
    return found


@torch.no_grad()
def batch_statistics(network: nn.Module, norms: Mapping[nn.Module, str], inputs: Tensor) -> Iterator[dict[str, Tensor]]:
    """Yield the mean and variance of these batch norms' inputs, once for every time that one of them runs.

    Args:
        network: what runs, without dropout; it is left in evaluation mode.
        norms: of ``running_norms``, by name; each normalises by the batch's own statistics.
        inputs: of the network.
    """
    runs: dict[nn.Module, int] = defaultdict(int)
    passes: list[dict[str, Tensor]] = []

    def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
        runs[module] += 1
        if runs[module] > len(passes):
            passes.append({})
        module.running_mean, module.running_var = mean, variance = statistics(inputs[0])
        passes[runs[module] - 1] |= {f"{norms[module]}.running_mean": mean, f"{norms[module]}.running_var": variance}

    network.eval()
    held = [(module, module.running_mean, module.running_var) for module in norms]
    handles = [module.register_forward_pre_hook(note) for module in norms]
    try:
        network(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for norm, mean, variance in held:
            norm.running_mean, norm.running_var = mean, variance  # the very tensors, which others hold
    yield from passes


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
