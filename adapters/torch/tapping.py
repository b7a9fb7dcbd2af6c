"""Taps from PyTorch modules: hooks that record layer inputs, and output gradients by one backward pass.

Convention: as in ``became_core.curvature.taps``. No weight gradient is computed: the backward pass stops at the
outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from became_core import BecameError
from became_core.curvature import Tap, Taps

__all__ = ["MATRIX_LAYERS", "collect_taps", "constant_statistics"]

MATRIX_LAYERS = (nn.Linear, nn.Conv2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
SCALE_LAYERS = (*BATCH_NORMS, nn.LayerNorm)


def collect_taps(network: nn.Module, names: dict[nn.Module, str], forward: Callable[[], Tensor]) -> Taps:
    """Run a forward pass that ends in the sum of the samples' losses; return the taps of all layers that took part.

    Args:
        network: what runs.
        names: canonical layer names.
        forward: returns the summed loss, a 0-d tensor.

    Raises:
        BecameError: if a layer with parameters of its own takes part that taps do not know, or one runs twice.
    """
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        if not isinstance(module, MATRIX_LAYERS + SCALE_LAYERS):
            raise BecameError(f"taps do not know the layer '{name}', a {type(module).__name__}.")
        if name in seen:
            raise BecameError(f"the layer '{name}' runs twice in one pass; taps need each layer to run once.")
        seen[name] = (module, inputs[0].detach(), output)

    handles = [
        module.register_forward_hook(record) for module in network.modules() if list(module.parameters(recurse=False))
    ]
    try:
        loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(loss, [output for _, _, output in seen.values()])
    return {name: _tap(*seen[name][:2], gradient) for name, gradient in zip(seen, gradients, strict=True)}


def _tap(module: nn.Module, inputs: Tensor, gradient: Tensor) -> Tap:
    has_bias = module.bias is not None
    if isinstance(module, nn.Conv2d):
        return Tap("matrix", _patches(module, inputs), gradient.flatten(2).transpose(1, 2), has_bias)
    if isinstance(module, nn.Linear):
        return Tap("matrix", _positions_in_the_middle(inputs), _positions_in_the_middle(gradient), has_bias)
    if isinstance(module, nn.LayerNorm):
        normalised = nn.functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        depth = len(module.normalized_shape)
        flat = [array.flatten(array.ndim - depth) for array in (normalised, gradient)]
        return Tap("scale", _positions_in_the_middle(flat[0]), _positions_in_the_middle(flat[1]), has_bias)
    assert isinstance(module, BATCH_NORMS)
    mean, variance = _statistics(module, inputs)
    normalised = nn.functional.batch_norm(inputs, mean, variance, eps=module.eps)
    return Tap("scale", _channels_last(normalised), _channels_last(gradient), has_bias)


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return what each output position sees, [N, positions, channels x height x width of the kernel]."""
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise BecameError("taps know convolutions with one group and numeric zero padding only.")
    patches = nn.functional.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2)


def _positions_in_the_middle(array: Tensor) -> Tensor:
    """Return [N, ..., d] as [N, positions, d]."""
    return array.reshape(array.shape[0], -1, array.shape[-1])


def _channels_last(array: Tensor) -> Tensor:
    """Return [N, C, ...] as [N, positions, C]."""
    return array.reshape(array.shape[0], array.shape[1], -1).transpose(1, 2)


def _statistics(module: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and (biased) variance that a batch norm applies to these inputs."""
    if module.running_mean is not None and not module.training:
        return module.running_mean, module.running_var
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    return inputs.mean(axes), inputs.var(axes, unbiased=False)


@contextmanager
def constant_statistics(network: nn.Module) -> Iterator[None]:
    """Let batch norms that keep no running statistics treat each batch's as constants of the forward pass.

    In evaluation mode such a layer computes its statistics from the batch, and their gradients couple the samples. For
    the time of this context they are computed beforehand, without gradient, so that per-sample gradients exist.
    """

    def fix(module: Any, inputs: tuple[Tensor, ...]) -> None:
        module.running_mean, module.running_var = _statistics(module, inputs[0].detach())

    def release(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 - a hook's signature
        module.running_mean = module.running_var = None

    handles = []
    for module in network.modules():
        if isinstance(module, BATCH_NORMS) and not module.track_running_stats:
            handles.append(module.register_forward_pre_hook(fix))
            handles.append(module.register_forward_hook(release))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
