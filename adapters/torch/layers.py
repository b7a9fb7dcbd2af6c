"""A network's outputs at other weights and their gradients, a convolution's patches, and batch norms' statistics.

A batch norm that keeps no running statistics takes each batch's own in evaluation too, and their gradients couple the
samples: for per-sample gradients to exist they are computed beforehand, without gradient. Variances are biased, as
batch norm has them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from became_core import BecameError
from became_core.errors import first_line

__all__ = [
    "Statistics",
    "batch_statistics",
    "buffers_kept",
    "constant_statistics",
    "estimate_statistics",
    "gradients_of",
    "is_batch_norm",
    "is_frozen_norm",
    "modes_kept",
    "moments",
    "outputs_at",
    "patches",
    "running_means",
    "running_norms",
]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# All layers that may have running statistics.
_WITH_STATISTICS = (*_BATCH_NORMS, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

# By module, the mean and variance of each of its runs in one pass.
Statistics = dict[nn.Module, list[tuple[Tensor, Tensor]]]


def outputs_at(network: nn.Module, theta: Mapping[str, Tensor], arguments: tuple[Any, ...]) -> Tensor:
    """Return a network's outputs at other weights, which it then no longer has.

    Each place in which a parameter stands gets the value once. PyTorch's own way to tied weights would set a layer that
    has two names twice, and put the first value back in the place of the parameter.

    Args:
        network: what runs.
        theta: by the names of its ``named_parameters``; a parameter without a value keeps its own.
        arguments: of the network.
    """
    named = dict(network.named_parameters())
    values = {named[name]: value for name, value in theta.items()}
    places = {
        f"{layer}.{name}" if layer else name: values[parameter]
        for layer, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in values
    }
    outputs: Tensor = torch.func.functional_call(network, places, arguments, tie_weights=False)
    return outputs


def gradients_of(
    outputs: Tensor, places: Sequence[Any], seed: Tensor, *, retain_graph: bool = False
) -> list[Tensor | None]:
    """Return the gradients of seed . outputs by tensors or places of the graph; None where there is none.

    Those of an embedding that asks for sparse ones are made dense.

    Raises:
        BecameError: if PyTorch cannot take them, as where an operation checkpoints by its reentrant way, or an input
            has been overwritten.
    """
    try:
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            outputs, places, seed, retain_graph=retain_graph, allow_unused=True
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise BecameError(f"the network's gradients cannot be taken ({first_line(error)}).") from error
    return [value if value is None or value.layout is torch.strided else value.to_dense() for value in gradients]


def patches(images: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Return what each output position of a convolution sees, [N, positions, channels x the kernel's sizes].

    The patches of all groups lie in a row. They are gathered as [N, channels x ..., positions], so that memory is read
    and written in runs, and handed over as a view of that.

    Args:
        images: [N, C, ...], with padding.
        kernel: its size along each axis; stride and dilation alike.
        stride: of the convolution.
        dilation: of the convolution.
    """
    windows = images.contiguous()
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        windows = windows.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
    outputs = range(2, 2 + len(kernel))
    sizes = range(outputs.stop, windows.ndim)
    gathered = windows.permute(0, 1, *sizes, *outputs)
    return gathered.reshape(len(images), prod(gathered.shape[1 : outputs.stop]), -1).transpose(1, 2)


@torch.no_grad()
def moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of each channel, of inputs [N, C, ...]."""
    # Batch norm's own way to them; ``Tensor.var`` takes a hundred times as long on a CPU.
    mean, variance = torch.batch_norm_update_stats(inputs, None, None, 0.0)
    return mean, variance


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the layer is a batch norm."""
    return isinstance(module, _BATCH_NORMS)


def is_frozen_norm(module: Any) -> bool:
    """Whether the layer is a batch norm with running statistics whose weights are frozen, and these with them."""
    weights = list(module.parameters(recurse=False))
    frozen = bool(weights) and not any(weight.requires_grad for weight in weights)
    return is_batch_norm(module) and module.running_mean is not None and frozen


def running_norms(names: Mapping[nn.Module, str]) -> dict[nn.Module, str]:
    """Return the batch norms in training mode that have running statistics, of modules by name."""
    norms: dict[nn.Module, str] = {}
    for module, name in names.items():
        if isinstance(module, _BATCH_NORMS) and module.running_mean is not None and module.training:
            norms[module] = name
    return norms


def running_means(network: nn.Module) -> dict[str, NDArray[Any]]:
    """Return the running means of all layers that have some, as they are, by the layer's own name."""
    norms = {name: module for name, module in network.named_modules() if isinstance(module, _WITH_STATISTICS)}
    return {
        name: norm.running_mean.detach().cpu().double().numpy().copy()
        for name, norm in norms.items()
        if isinstance(norm.running_mean, Tensor)
    }


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
        module.running_mean, module.running_var = mean, variance = moments(inputs[0])
        passes[runs[module] - 1] |= {f"{norms[module]}.running_mean": mean, f"{norms[module]}.running_var": variance}

    network.eval()
    before = [(module, module.running_mean, module.running_var) for module in norms]
    handles = [module.register_forward_pre_hook(note) for module in norms]
    try:
        network(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for norm, mean, variance in before:
            norm.running_mean, norm.running_var = mean, variance  # the very tensors, which others may have
    yield from passes


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Give all modules within a module the modes back that they had, after this context."""
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give a module's buffers the values back that they had, and those tensors that it had."""
    with ExitStack() as stack:
        for layer in module.modules():
            for name, buffer in layer.named_buffers(recurse=False):
                stack.callback(_restore, layer, name, buffer, buffer.clone())
        yield


@torch.no_grad()
def _restore(layer: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    buffer.copy_(value)
    setattr(layer, name, buffer)


@torch.no_grad()
def estimate_statistics(model: nn.Module, passes: Iterable[Callable[[], Any]]) -> None:
    """Estimate the running statistics of a model's norms anew, as the mean over batches of each batch's own.

    Norms whose weights the user has frozen keep theirs, and every module keeps its mode.

    Args:
        model: the model, which is otherwise in evaluation mode.
        passes: each runs the model on one batch.

    Raises:
        BecameError: if there is no batch, or one of a single sample, which has no variance; statistics are left as they
            were then.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _WITH_STATISTICS)
        and module.running_mean is not None
        and all(parameter.requires_grad for parameter in module.parameters())
    ]
    momenta = [module.momentum for module in norms]
    before = [(buffer, buffer.clone()) for module in norms for buffer in module.buffers(recurse=False)]
    batches, runs = 0, dict.fromkeys(norms, 0)

    def weigh(module: Any, _: Any) -> None:
        runs[module] += 1
        module.momentum = 1 / runs[module]  # which makes a plain mean over all runs

    handles = [module.register_forward_pre_hook(weigh) for module in norms]
    try:
        with modes_kept(model):
            model.eval()
            for module in norms:
                module.reset_running_stats()
                module.training = True
            for run in passes:
                run()
                batches += 1
        if norms and not batches:
            raise BecameError("there is no batch to estimate running statistics from; an iterator can be read once.")
    except BaseException as error:
        for buffer, value in before:
            buffer.copy_(value)
        if isinstance(error, ValueError) and not isinstance(error, BecameError):
            raise BecameError(
                f"running statistics are as they were: {error}; give batches of several samples, where the model can "
                "be trained."
            ) from error
        raise
    finally:
        for handle in handles:
            handle.remove()
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum


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
        runs.append(moments(inputs[0].detach()) if known is None else known[module][len(runs)])
        module.running_mean, module.running_var = runs[-1]

    modules: list[Any] = [
        module for module in network.modules() if isinstance(module, _BATCH_NORMS) and not module.track_running_stats
    ]
    handles = [module.register_forward_pre_hook(fix) for module in modules]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            module.running_mean = module.running_var = None
