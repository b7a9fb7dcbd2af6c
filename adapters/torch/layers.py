"""The PyTorch layers that taps know and what each gives a tap; batch norms and their statistics.

Convention: as in ``became_core.curvature.taps``; a layer's inputs and output gradients come as PyTorch has them,
samples first. A class is known by itself, never by a subclass, which may compute something else.

A batch norm that keeps no running statistics takes each batch's own in evaluation too, and their gradients couple the
samples: for per-sample gradients to exist they are computed beforehand, without gradient. Variances are biased, as
batch norm has them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from became_core.curvature import Tap

__all__ = [
    "Statistics",
    "arranged_inputs",
    "batch_statistics",
    "constant_statistics",
    "input_tap_of",
    "is_batch_norm",
    "is_frozen_norm",
    "is_known",
    "is_matrix",
    "moments",
    "running_norms",
    "tap_of",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

# By module, the mean and variance of each of its runs in one pass.
Statistics = dict[nn.Module, list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class _Layer:
    """How a class of layers is tapped.

    Attributes:
        kind: of the tap.
        inputs: (module, inputs) -> the tap's inputs.
        gradients: (module, gradient by the output) -> the tap's output gradients.
    """

    kind: Literal["matrix", "scale", "embedding"]
    inputs: Callable[[Any, Tensor], Tensor]
    gradients: Callable[[Any, Tensor], Tensor]


def is_known(module: nn.Module) -> bool:
    """Whether taps know the layer."""
    return type(module) in _LAYERS


def is_matrix(module: nn.Module) -> bool:
    """Whether the layer's weight is one matrix on the layer's whole input space, as a projector can protect it."""
    return type(module) in (nn.Linear, *_CONVOLUTIONS) and getattr(module, "groups", 1) == 1


def arranged_inputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a known layer's tap has for inputs."""
    return _LAYERS[type(module)].inputs(module, inputs)


def input_tap_of(module: Any, inputs: Tensor) -> Tap:
    """Return the tap of a matrix that had these inputs in a forward pass alone; it holds a copy of them."""
    has_bias = module.bias is not None
    if _is_window(module):
        images = _padded(module, inputs).clone()
        return Tap("window", images, images[:, :0, :0], has_bias, kernel=module.kernel_size)
    arranged = arranged_inputs(module, inputs).clone()
    return Tap("matrix", arranged, arranged[:, :, :0], has_bias)


def _is_window(module: Any) -> bool:
    """Whether a layer is a convolution whose windows slide by one, over all channels together."""
    steps = (1, 1)
    return type(module) is nn.Conv2d and module.groups == 1 and module.stride == steps and module.dilation == steps


def tap_of(module: Any, inputs: Tensor, gradient: Tensor) -> Tap:
    """Return the tap of a known layer.

    Args:
        module: the layer.
        inputs: arranged by ``arranged_inputs``.
        gradient: by the layer's output.
    """
    layer = _LAYERS[type(module)]
    g = layer.gradients(module, gradient)
    if layer.kind == "embedding":
        if module.padding_idx is not None:  # whose row gets no gradient
            g = g.masked_fill((inputs == module.padding_idx)[..., None], 0.0)
        return Tap("embedding", inputs, g, size=module.num_embeddings)
    return Tap(layer.kind, inputs, g, getattr(module, "bias", None) is not None, getattr(module, "groups", 1))


def _positions_in_the_middle(_: nn.Module, array: Tensor) -> Tensor:
    """Return [N, ..., d] as [N, positions, d]."""
    return array.reshape(array.shape[0], -1, array.shape[-1])


def _channels_last(_: nn.Module, array: Tensor) -> Tensor:
    """Return [N, C, ...] as [N, positions, C]."""
    return array.movedim(1, -1).reshape(array.shape[0], -1, array.shape[1])


def _trailing(module: Any, array: Tensor) -> Tensor:
    """Return [N, ..., *the normalised shape] as [N, positions, d]."""
    return array.reshape(array.shape[0], -1, prod(module.normalized_shape))


def _patches(module: Any, inputs: Tensor) -> Tensor:
    """Return what each output position sees, [N, positions, channels x the kernel's sizes], of all groups in a row.

    They are gathered as [N, channels x ..., positions], so that memory is read and written in runs, and handed over as
    a view of that.
    """
    windows = _padded(module, inputs).contiguous()
    kernel = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(kernel, start=2):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    outputs = range(2, 2 + len(module.kernel_size))
    sizes = range(outputs.stop, windows.ndim)
    patches = windows.permute(0, 1, *sizes, *outputs)
    return patches.reshape(len(inputs), prod(patches.shape[1 : outputs.stop]), -1).transpose(1, 2)


def _padded(module: Any, inputs: Tensor) -> Tensor:
    """Return the inputs as a convolution pads them."""
    around: list[int] = []  # as ``functional.pad`` takes it, the last axis first
    for axis in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            both = module.dilation[axis] * (module.kernel_size[axis] - 1) if module.padding == "same" else 0
            around += [both // 2, both - both // 2]
        else:
            around += [module.padding[axis]] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(inputs, around, mode=mode) if any(around) else inputs


def _embedded(_: nn.Module, inputs: Tensor) -> Tensor:
    return inputs.reshape(len(inputs), -1)


def _layer_normalised(module: nn.LayerNorm, inputs: Tensor) -> Tensor:
    return _trailing(module, functional.layer_norm(inputs, module.normalized_shape, eps=module.eps))


def _rms_normalised(module: nn.RMSNorm, inputs: Tensor) -> Tensor:
    return _trailing(module, functional.rms_norm(inputs, list(module.normalized_shape), eps=module.eps))


def _group_normalised(module: nn.GroupNorm, inputs: Tensor) -> Tensor:
    return _channels_last(module, functional.group_norm(inputs, module.num_groups, eps=module.eps))


def _batch_normalised(module: Any, inputs: Tensor) -> Tensor:
    has_own = module.running_mean is not None and not module.training
    mean, variance = (module.running_mean, module.running_var) if has_own else moments(inputs)
    return _channels_last(module, functional.batch_norm(inputs, mean, variance, eps=module.eps))


def _instance_normalised(module: Any, inputs: Tensor) -> Tensor:
    if module.running_mean is not None and not module.training:
        return _batch_normalised(module, inputs)
    return _channels_last(module, functional.instance_norm(inputs, eps=module.eps))


_LAYERS: dict[type[nn.Module], _Layer] = {
    nn.Linear: _Layer("matrix", _positions_in_the_middle, _positions_in_the_middle),
    **dict.fromkeys(_CONVOLUTIONS, _Layer("matrix", _patches, _channels_last)),
    nn.Embedding: _Layer("embedding", _embedded, _positions_in_the_middle),
    nn.LayerNorm: _Layer("scale", _layer_normalised, _trailing),
    nn.RMSNorm: _Layer("scale", _rms_normalised, _trailing),
    nn.GroupNorm: _Layer("scale", _group_normalised, _channels_last),
    **dict.fromkeys(_BATCH_NORMS, _Layer("scale", _batch_normalised, _channels_last)),
    **dict.fromkeys(_INSTANCE_NORMS, _Layer("scale", _instance_normalised, _channels_last)),
}


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
