"""Backbones, images to features, and the multi-head network that every backbone becomes.

Convention: images are [N, C, H, W]; a backbone returns [N, features]; heads have no bias, one for each task.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adapters.initial import initial_value
from adapters.torch.dropout import Dropout
from became_core import BecameError

__all__ = ["BACKBONES", "MultiHead", "alexnet", "build_backbone", "draw_weights", "mlp"]


def mlp(channels: int, height: int, width: int) -> nn.Sequential:
    """Return the fully connected network of the MNIST benchmarks: two hidden layers of 100 units, no biases."""
    return _sequential(
        flatten=nn.Flatten(),
        fc1=nn.Linear(channels * height * width, 100, bias=False),
        relu1=nn.ReLU(),
        fc2=nn.Linear(100, 100, bias=False),
        relu2=nn.ReLU(),
    )


def alexnet(channels: int, height: int, width: int) -> nn.Sequential:
    """Return the AlexNet-like network of the CIFAR-100 benchmarks (Serra 2018, as used by Saha 2021), no biases.

    Three convolutions (64 at 4x4, 128 at 3x3, 256 at 2x2) and two fully connected layers of 2048 units, each followed
    by batch norm with batch statistics, ReLU and dropout (.2, .2, .5, .5, .5); the convolutions by 2x2 max-pooling too.
    """
    return _sequential(
        **_convolution(1, channels, 64, kernel=4, dropout=0.2),
        **_convolution(2, 64, 128, kernel=3, dropout=0.2),
        **_convolution(3, 128, 256, kernel=2, dropout=0.5),
        flatten=nn.Flatten(),
        **_fully_connected(1, 256 * _after_convolutions(height) * _after_convolutions(width), 2048, dropout=0.5),
        **_fully_connected(2, 2048, 2048, dropout=0.5),
    )


def _after_convolutions(size: int) -> int:
    """Return an image side's length after the three convolutions, each with its pooling."""
    for kernel in (4, 3, 2):
        size = (size - kernel + 1) // 2
    return size


def _convolution(number: int, channels: int, filters: int, kernel: int, dropout: float) -> dict[str, nn.Module]:
    return {
        f"conv{number}": nn.Conv2d(channels, filters, kernel, bias=False),
        f"bn{number}": nn.BatchNorm2d(filters, track_running_stats=False),
        f"relu{number}": nn.ReLU(),
        f"drop{number}": Dropout(dropout),
        f"pool{number}": nn.MaxPool2d(2),
    }


def _fully_connected(number: int, inputs: int, outputs: int, dropout: float) -> dict[str, nn.Module]:
    position = number + 3  # after three convolutions
    return {
        f"fc{number}": nn.Linear(inputs, outputs, bias=False),
        f"bn{position}": nn.BatchNorm1d(outputs, track_running_stats=False),
        f"relu{position}": nn.ReLU(),
        f"drop{position}": Dropout(dropout),
    }


def _sequential(**layers: nn.Module) -> nn.Sequential:
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    return network


# Each takes an image's channels, height and width.
BACKBONES: dict[str, Callable[[int, int, int], nn.Module]] = {"alexnet": alexnet, "mlp": mlp}


def build_backbone(name: str, shape: tuple[int, int, int]) -> nn.Module:
    """Return the backbone of that name for images of this shape [C, H, W].

    Raises:
        BecameError: if there is none, or the images are too small for it.
    """
    if name not in BACKBONES:
        raise BecameError(f"there is no network '{name}'; choose from {', '.join(sorted(BACKBONES))}.")
    if name == "alexnet" and min(shape[1:]) < 22:
        raise BecameError(f"the alexnet network needs images of at least 22x22 pixels, not {shape[1]}x{shape[2]}.")
    return BACKBONES[name](*shape)


@torch.no_grad()
def draw_weights(network: nn.Module, seed: int, prefix: str = "") -> None:
    """Give every linear, convolutional and normalisation layer its initial weights, the same on any backend.

    Args:
        network: whose layers' names are canonical, after the prefix.
        seed: names the draw.
        prefix: what their names begin with.
    """
    for layer, module in network.named_modules():
        fan_in = module.weight[0].numel() if isinstance(module, nn.Linear | nn.Conv2d) else None
        for name, parameter in module.named_parameters(recurse=False):
            value = initial_value(seed, f"{prefix}{layer}.{name}", tuple(parameter.shape), fan_in)
            parameter.copy_(torch.from_numpy(value))


class MultiHead(nn.Module):
    """A backbone with a linear head for each task, ``heads.<task>.weight``."""

    def __init__(self, backbone: nn.Module, features: int, tasks: int, classes: int, seed: int = 0) -> None:
        """Build the heads.

        Args:
            backbone: images [N, C, H, W] to features [N, features].
            features: the backbone's output width.
            tasks: how many heads.
            classes: every head's width.
            seed: names the draw of the heads' weights; the backbone keeps those it has.
        """
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Linear(features, classes, bias=False) for _ in range(tasks))
        draw_weights(self.heads, seed, prefix="heads.")

    def forward(self, images: Tensor, task: int | None = None) -> Tensor:
        """Return one task's logits [N, classes], or, if no task is given, all heads' [N, tasks, classes]."""
        features = self.backbone(images)
        if task is not None:
            logits: Tensor = self.heads[task](features)
            return logits
        return torch.stack([head(features) for head in self.heads], dim=1)
