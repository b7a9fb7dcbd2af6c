"""Described networks as PyTorch modules, and the multi-head network that every backbone becomes.

Convention: images are [N, C, H, W]; a backbone returns [N, features]; heads have no bias, one for each task.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters import networks
from adapters.backend import Heads
from adapters.networks import (
    GELU,
    Architecture,
    AveragePool,
    BatchNorm,
    CausalAttention,
    Convolution,
    Embedding,
    Flatten,
    GroupNorm,
    LastPosition,
    Latent,
    LayerNorm,
    Linear,
    MaxPool,
    Positions,
    ReLU,
    Shape,
    Tanh,
    Weighted,
    draw_mask,
    initial_value,
    initial_values,
)

__all__ = ["Described", "Drawing", "Dropout", "MultiHead", "OneHead", "draw_masks_from"]


class Drawing(nn.Module):
    """A layer that draws at random in training.

    Attributes:
        rng: what it draws from, so that every backend can draw the same; PyTorch if it is None.
        part: if inputs are some samples of a batch, how many it has, and which they are; the whole batch's is drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rng: np.random.Generator | None = None
        self.part: tuple[int, slice] | None = None

    def drawn(self, shape: tuple[int, ...], threshold: int | None) -> Tensor:
        """Return the mask, or the noise, of some of a batch's samples, which ``shape`` begins with."""
        samples, own = self.part or (shape[0], slice(None))
        assert self.rng is not None
        return torch.from_numpy(draw_mask((samples, *shape[1:]), threshold, self.rng)[own])


class Dropout(Drawing):
    """Zero each element with probability p in training and scale the rest by 1 / (1 - p).

    p is rounded to a multiple of 2^-16. A mask for images is drawn with channels last, [N, H, W, C], the order in which
    they lie in memory.
    """

    def __init__(self, p: float) -> None:
        """Keep the probability."""
        super().__init__()
        self.threshold = round(p * 2**16)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs, dropped out in training."""
        if not self.training or self.threshold == 0:
            return inputs
        p = self.threshold / 2**16
        if self.rng is None:
            return nn.functional.dropout(inputs, p)
        keep = self.drawn(inputs.movedim(1, -1).shape, self.threshold).movedim(-1, 1)
        return inputs * keep.to(inputs.device, inputs.dtype).mul_(1 / (1 - p))


class _Latent(Drawing):
    """The mean plus the standard deviation times noise, of means, log variances and the samples' noise, [N, 3 d]."""

    def forward(self, inputs: Tensor) -> Tensor:
        mean, log_variance, noise = inputs.chunk(3, dim=1)
        if self.training:
            noise = torch.randn_like(noise) if self.rng is None else self.drawn(noise.shape, None).to(noise)
        return mean + (log_variance / 2).exp() * noise


def draw_masks_from(network: nn.Module, rng: np.random.Generator | None) -> None:
    """Let all layers of a network that draw do so from a generator, in the order in which they run; None for PyTorch's.

    Args:
        network: with layers of ours.
        rng: the generator.
    """
    for module in network.modules():
        if isinstance(module, Drawing):
            module.rng = rng


class _AddedPositions(nn.Module):
    """Add a row of the weight to each position of [N, L, d]."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.weight[: inputs.shape[1]]


class _LastPosition(nn.Module):
    """What [N, L, d] has at the last position."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, -1]


class _Attention(nn.Module):
    """Causal attention of queries, keys and values in a row, [N, L, 3 d]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, inputs: Tensor) -> Tensor:
        n, length, width = inputs.shape
        q, k, v = inputs.reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(1, 2).reshape(n, length, width // 3)


def _batch_norm(layer: BatchNorm, shape: Shape) -> nn.Module:
    kind = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    return kind(shape[0], layer.epsilon, track_running_stats=layer.running)


# By class of layer: (layer, shape of its inputs) -> module.
_MODULES: dict[type, Callable[[Any, Shape], nn.Module]] = {
    Linear: lambda layer, shape: nn.Linear(shape[-1], layer.outputs, layer.bias),
    Embedding: lambda layer, shape: nn.Embedding(layer.size, layer.width),
    Positions: lambda layer, shape: _AddedPositions(layer.size, shape[-1]),
    LayerNorm: lambda layer, shape: nn.LayerNorm(shape[-1], layer.epsilon),
    CausalAttention: lambda layer, shape: _Attention(layer.heads),
    GELU: lambda layer, shape: nn.GELU(),
    Convolution: lambda layer, shape: nn.Conv2d(
        shape[0], layer.outputs, layer.kernel, layer.stride, layer.padding, bias=layer.bias
    ),
    BatchNorm: _batch_norm,
    GroupNorm: lambda layer, shape: nn.GroupNorm(layer.groups(shape[0]), shape[0], layer.epsilon),
    ReLU: lambda layer, shape: nn.ReLU(),
    Tanh: lambda layer, shape: nn.Tanh(),
    networks.Dropout: lambda layer, shape: Dropout(layer.p),
    MaxPool: lambda layer, shape: nn.MaxPool2d(layer.size),
    AveragePool: lambda layer, shape: nn.AvgPool2d(layer.size),
    Flatten: lambda layer, shape: nn.Flatten(),
    LastPosition: lambda layer, shape: _LastPosition(),
    Latent: lambda layer, shape: _Latent(),
}


class Described(nn.Module):
    """A described network as a module, whose parameters go by their canonical names.

    Attributes:
        steps: the modules of all layers, in the order in which they run.
    """

    def __init__(self, architecture: Architecture, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        """Make the modules and draw their weights.

        Args:
            architecture: the description.
            seed: names the draw of the initial weights.
            dtype: of the weights.
        """
        super().__init__()
        self._architecture = architecture
        self.steps = tuple(_MODULES[type(layer)](layer, shape) for layer, shape in architecture.steps)
        for index, ((layer, _), module) in enumerate(zip(architecture.steps, self.steps, strict=True)):
            name = layer.name if isinstance(layer, Weighted) else f"{index}:{type(layer).__name__}"
            _place(self, name, module)
        self.to(dtype)
        with torch.no_grad():
            initial = initial_values(seed, architecture.parameters)
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(initial[name]))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [N, features] of images [N, C, H, W]."""
        modules = iter(self.steps)
        features: Tensor = self._architecture(lambda layer, inputs: next(modules)(inputs), images)
        return features


def _place(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Make a module a descendant, so that a dotted name is its own."""
    own, _, rest = name.partition(".")
    if not rest:
        parent.add_module(own, module)
        return
    if own not in dict(parent.named_children()):
        parent.add_module(own, nn.Module())
    _place(parent.get_submodule(own), rest, module)


class MultiHead(nn.Module):
    """A backbone with a linear head for each task, ``heads.<task>.weight``."""

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        classes: Sequence[int],
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        naming: Heads | None = None,
        beside: int = 0,
    ) -> None:
        """Build the heads.

        Args:
            backbone: images [N, C, H, W] to features [N, features].
            features: how many the heads see.
            classes: the width of each head.
            seed: names the draw of the heads' weights; the backbone keeps those it has.
            dtype: of the heads' weights.
            naming: the names of the heads, by which their weights are drawn; the usual ones if not given.
            beside: how many features follow those, which are outputs as they are, after the head's.
        """
        super().__init__()
        self.backbone = backbone
        self._features, self._beside = features, beside
        self._shared = naming is not None and naming.shared
        classes = classes[:1] if self._shared else classes
        self.heads = nn.ModuleList(nn.Linear(features, width, bias=False, dtype=dtype) for width in classes)
        self._widest = max(classes)
        with torch.no_grad():
            for task, (head, width) in enumerate(zip(self.heads, classes, strict=True)):
                name = f"{(naming or Heads()).name(task)}.weight"
                weight: Any = head.weight
                weight.copy_(torch.from_numpy(initial_value(seed, name, (width, features), features)))

    def head(self, task: int) -> nn.Module:
        """Return the head of a task."""
        return self.heads[0 if self._shared else task]

    def forward(self, images: Tensor, task: int | slice = slice(None)) -> Tensor:
        """Return one task's logits [N, classes], or those of several heads [N, heads, classes], of all by default.

        Among several, a head of fewer classes than others has -inf for those that it has not.
        """
        features = self.backbone(images)
        apart: list[Tensor] = []
        if self._beside:
            features, *apart = features.split([self._features, self._beside], dim=-1)
        if not isinstance(task, slice):
            logits: Tensor = self.head(task)(features)
            return torch.cat([logits, *apart], dim=-1) if apart else logits
        # Many heads are called for every batch that is scored: their products alone, and not the modules.
        heads: list[Any] = list(self.heads)[task]
        by_head = [nn.functional.linear(features, head.weight) for head in heads]
        missing = [self._widest - logits.shape[-1] for logits in by_head]
        if any(missing):
            pad = nn.functional.pad
            by_head = [pad(it, (0, classes), value=-math.inf) for it, classes in zip(by_head, missing, strict=True)]
        of_heads = torch.stack(by_head, dim=1)
        if not apart:
            return of_heads
        return torch.cat([of_heads, apart[0].unsqueeze(1).expand(-1, of_heads.shape[1], *apart[0].shape[1:])], dim=-1)


class OneHead(nn.Module):
    """A network with the head of one task, so that whoever walks through its modules meets no other head."""

    def __init__(self, network: MultiHead, task: int) -> None:
        """Share the backbone and the task's head with a network."""
        super().__init__()
        self.backbone, self.head = network.backbone, network.head(task)
        self._logits = partial(network, task=task)

    def forward(self, images: Tensor) -> Tensor:
        """Return the task's logits [N, classes]."""
        logits: Tensor = self._logits(images)
        return logits
