"""The benchmarks' networks, images to features, described once for every framework; by name.

Convention: each takes an image's channels, height and width; those of text take its length. None has a bias.
Normalisation layers have a weight and a bias of their own, and those of images are of one of three kinds:

| norm | statistics | names |
| --- | --- | --- |
| ``batch`` | the batch's, in testing too, as published | ``bn1`` |
| ``running`` | the batch's in training, running ones otherwise | ``bn1``, with ``bn1.running_mean`` and ``_var`` |
| ``group`` | each image's own, over gcd(32, channels) groups of channels | ``norm1`` |
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from adapters.networks.description import Architecture
from adapters.networks.layers import (
    GELU,
    AveragePool,
    BatchNorm,
    Branches,
    CausalAttention,
    Convolution,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    LastPosition,
    Latent,
    Layer,
    LayerNorm,
    Linear,
    MaxPool,
    Positions,
    ReLU,
    Residual,
)
from became_core import BecameError
from became_core.registry import Catalogue

__all__ = [
    "NETWORKS",
    "HubNetwork",
    "Norm",
    "alexnet",
    "build_network",
    "gpt",
    "hub_network",
    "mlp",
    "preact_resnet18",
    "resnet18",
    "vae",
]

Norm = Literal["batch", "running", "group"]
Package = Literal["transformers", "timm"]
PACKAGES: dict[str, Package] = {"hf:": "transformers", "timm:": "timm"}  # by how their networks' names begin


def mlp(channels: int, height: int, width: int, norm: Norm = "batch") -> Architecture:
    """Return the fully connected network of the MNIST benchmarks: two hidden layers of 100 units.

    Raises:
        BecameError: if another norm is asked for than it has, which is none.
    """
    if norm != "batch":
        raise BecameError(f"the mlp network has no normalisation that could be '{norm}'; leave the norm out.")
    layers = Flatten(), Linear("fc1", 100), ReLU(), Linear("fc2", 100), ReLU()
    return Architecture(layers, (channels, height, width))


def alexnet(channels: int, height: int, width: int, norm: Norm = "batch") -> Architecture:
    """Return the AlexNet-like network of the CIFAR-100 benchmarks (Serra 2018, as used by Saha 2021).

    Three convolutions (64 at 4x4, 128 at 3x3, 256 at 2x2) and two fully connected layers of 2048 units, each followed
    by batch norm, ReLU and dropout (.2, .2, .5, .5, .5); the convolutions by 2x2 max-pooling too.

    Raises:
        BecameError: if the images are too small for it.
    """
    _assert_at_least(22, "alexnet", height, width)
    layers: list[Layer] = []
    for number, (filters, kernel, p) in enumerate(((64, 4, 0.2), (128, 3, 0.2), (256, 2, 0.5)), start=1):
        layers += [Convolution(f"conv{number}", filters, kernel), *_normalised(norm, number, p), MaxPool(2)]
    layers.append(Flatten())
    for number in (1, 2):
        layers += [Linear(f"fc{number}", 2048), *_normalised(norm, number + 3, 0.5)]
    return Architecture(tuple(layers), (channels, height, width))


def resnet18(channels: int, height: int, width: int, norm: Norm = "batch") -> Architecture:
    """Return the ResNet-18 of the miniImageNet benchmarks, with 20 base filters (He 2016, as used by Saha 2021).

    As in the published code of GPM: a 3x3 convolution with stride 2 and padding 1, batch norm and ReLU; four groups of
    two basic blocks, of 20, 40, 80 and 160 filters, the first block of a group with stride 1, 2, 2 and 2; 2x2 average
    pooling, which leaves 3x3 places of 84x84 pixels and so 1440 features. A block is two 3x3 convolutions with padding
    1, each with batch norm, ReLU between them and after the sum with the shortcut: the identity or, where the shape
    changes, a 1x1 convolution of the block's stride with batch norm.

    Raises:
        BecameError: if the images are too small for it.
    """
    _assert_at_least(17, "resnet18", height, width)
    stem: tuple[Layer, ...] = (Convolution("conv1", 20, 3, stride=2, padding=1), _norm(norm, "bn1"), ReLU())
    groups = enumerate(((20, 1), (40, 2), (80, 2), (160, 2)), start=1)
    blocks = (
        _block(f"layer{group}.{index}", filters, stride if index == 0 else 1, norm, keeps=group == 1 or index > 0)
        for group, (filters, stride) in groups
        for index in (0, 1)
    )
    layers = (*stem, *chain.from_iterable(blocks), AveragePool(2), Flatten())
    return Architecture(layers, (channels, height, width))


def preact_resnet18(channels: int, height: int, width: int, norm: Norm = "batch") -> Architecture:
    """Return the pre-activation ResNet-18 of Adam-NSCL, with 64 base filters (He 2016, "Identity mappings"; Wang 2021).

    A 3x3 convolution of 64 filters with stride 1 and padding 1; four groups of two blocks, of 64, 128, 256 and 512
    filters, the first block of a group with stride 1, 2, 2 and 2; batch norm, ReLU, and the mean over all places, which
    gives 512 features (11.2 M parameters). A block is batch norm, ReLU, 3x3 convolution, batch norm, ReLU, 3x3
    convolution, plus a shortcut. As in the published code, the shortcut begins after the first batch norm: it is that
    norm's output or, where the shape changes, a 1x1 convolution of what the ReLU makes of it.

    The mean is over squares of the smaller side, so that an image that is not square has more features.
    """
    layers: list[Layer] = [Convolution("conv1", 64, 3, padding=1)]
    side, filters_before = min(height, width), 64
    for group, (filters, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), start=1):
        for index, step in enumerate((stride, 1)):
            name = f"stage{group}.{index}"
            body = (
                *(Convolution(f"{name}.conv1", filters, 3, step, padding=1), _norm(norm, f"{name}.bn2"), ReLU()),
                Convolution(f"{name}.conv2", filters, 3, padding=1),
            )
            layers.append(_norm(norm, f"{name}.bn1"))
            if step == 1 and filters == filters_before:
                layers.append(Residual((ReLU(), *body)))
            else:
                layers += [ReLU(), Residual(body, (Convolution(f"{name}.shortcut.0", filters, 1, step),))]
            side, filters_before = (side - 1) // step + 1, filters
    layers += [_norm(norm, "bn_last"), ReLU(), AveragePool(side), Flatten()]
    return Architecture(tuple(layers), (channels, height, width))


def _block(name: str, filters: int, stride: int, norm: Norm, *, keeps: bool) -> tuple[Layer, ...]:
    """Return a basic block; whether it keeps the shape of its inputs decides on its shortcut."""
    body = (
        *(Convolution(f"{name}.conv1", filters, 3, stride, padding=1), _norm(norm, f"{name}.bn1"), ReLU()),
        *(Convolution(f"{name}.conv2", filters, 3, padding=1), _norm(norm, f"{name}.bn2")),
    )
    projection = Convolution(f"{name}.shortcut.0", filters, 1, stride), _norm(norm, f"{name}.shortcut.1")
    return Residual(body, () if keeps else projection), ReLU()


def _normalised(norm: Norm, number: int, p: float) -> tuple[Layer, ...]:
    return _norm(norm, f"bn{number}"), ReLU(), Dropout(p)


def _norm(norm: Norm, name: str) -> BatchNorm | GroupNorm:
    return GroupNorm(name.replace("bn", "norm")) if norm == "group" else BatchNorm(name, running=norm == "running")


def _assert_at_least(side: int, name: str, height: int, width: int) -> None:
    if min(height, width) < side:
        raise BecameError(f"the {name} network needs images of at least {side}x{side} pixels, not {height}x{width}.")


def gpt(length: int, norm: Norm = "batch", *, width: int = 96, blocks: int = 2, heads: int = 4) -> Architecture:
    """Return a decoder-only transformer of bytes (Radford 2019), with about 0.3 million weights.

    A byte's row of an embedding and its position's; blocks of causal attention and of a GELU MLP of four times the
    width, each after a layer norm (LayerNorm, which has a weight and a bias) and beside a shortcut; a last layer norm.

    Args:
        length: how many bytes a sample has.
        norm: as of the other networks; it has none of these kinds.
        width: of the features of a byte.
        blocks: how many.
        heads: of attention.

    Raises:
        BecameError: if another norm is asked for.
    """
    if norm != "batch":
        raise BecameError(f"the gpt networks have layer norms, and none that could be '{norm}'; leave the norm out.")
    layers: list[Layer] = [Embedding("tokens", 256, width), Positions("positions", length)]
    for block in range(blocks):
        name = f"block{block}"
        attention = LayerNorm(f"{name}.norm1"), Linear(f"{name}.qkv", 3 * width), CausalAttention(heads)
        mlp = LayerNorm(f"{name}.norm2"), Linear(f"{name}.fc1", 4 * width), GELU(), Linear(f"{name}.fc2", width)
        layers += [Residual((*attention, Linear(f"{name}.out", width))), Residual(mlp)]
    return Architecture((*layers, LayerNorm("norm")), (length,))


def _gpt_medium(length: int, norm: Norm = "batch") -> Architecture:
    """Return the transformer of gpt with about 3 million weights: 4 blocks of 256 features and 8 heads."""
    return gpt(length, norm, width=256, blocks=4, heads=8)


def _gpt_large(length: int, norm: Norm = "batch") -> Architecture:
    """Return the transformer of gpt with about 30 million weights: 6 blocks of 640 features and 10 heads."""
    return gpt(length, norm, width=640, blocks=6, heads=10)


def _gpt_last(length: int, norm: Norm = "batch") -> Architecture:
    """Return the transformer of gpt with the features of the last byte, which are those of the whole text."""
    every = gpt(length, norm)
    return Architecture((*every.layers, LastPosition()), every.image)


def vae(channels: int, height: int, width: int, norm: Norm = "batch", *, latent: int = 16) -> Architecture:
    """Return a variational autoencoder of pictures (Kingma & Welling 2014), with about 0.3 million weights.

    A sample is a row of pixels and of noise, [pixels + latent, 1, 1]. The encoder makes of the pixels the mean and the
    log variance of each latent number; the decoder makes of a draw 200 features, of which the head makes the pixels'
    logits. Means and log variances are outputs besides, as the likelihood ``ELBO`` has them.

    Args:
        channels: the numbers of a sample.
        height: 1.
        width: 1.
        norm: as of the other networks; it has none.
        latent: how many latent numbers there are.

    Raises:
        BecameError: if samples are no such rows, or a norm is asked for.
    """
    if norm != "batch":
        raise BecameError(f"the vae network has no normalisation that could be '{norm}'; leave the norm out.")
    if (height, width) != (1, 1) or channels <= latent:
        raise BecameError(
            f"the vae network needs rows of pixels and of {latent} numbers of noise, as split-mnist-vae has, and no "
            f"images [{channels}, {height}, {width}]."
        )
    encoder = Linear("encoder.fc1", 200), ReLU(), Linear("encoder.fc2", 2 * latent)
    decoder = Latent(), Linear("decoder.fc1", 200), ReLU()
    layers = (
        Flatten(),
        Branches(((0, channels - latent, encoder), (channels - latent, channels, ()))),
        Branches(((0, 3 * latent, decoder), (0, 2 * latent, ()))),
    )
    return Architecture(layers, (channels, height, width), beside=2 * latent, encoding="encoder.fc2")


NETWORKS: Catalogue[Callable[..., Architecture]] = Catalogue(
    "became.networks",
    "network",
    {
        "alexnet": alexnet,
        "mlp": mlp,
        "preact_resnet18": preact_resnet18,
        "resnet18": resnet18,
        "gpt": gpt,
        "gpt-medium": _gpt_medium,
        "gpt-large": _gpt_large,
        "gpt-last": _gpt_last,
        "vae": vae,
    },
)


@dataclass(frozen=True)
class HubNetwork:
    """A network of a package of networks, for PyTorch.

    Attributes:
        source: for ``transformers``, a folder with ``config.json`` or a name on Hugging Face's hub; for ``timm``, what
            its ``create_model`` takes.
        pretrained: whether its weights are read as well; otherwise the run's seed draws them.
        package: which package builds it.
    """

    source: str
    pretrained: bool = False
    package: Package = "transformers"


def hub_network(name: str, norm: Norm = "batch", *, pretrained: bool = False) -> HubNetwork | None:
    """Return the network of a package that a name such as ``hf:NAME`` is of; None if the name is one of ``NETWORKS``.

    >>> hub_network("hf:google/vit-base-patch16-224-in21k").source
    'google/vit-base-patch16-224-in21k'
    >>> hub_network("timm:vit_base_patch16_224").package
    'timm'

    Raises:
        BecameError: if there is no such name, or it has no such normalisation or no pretrained weights.
    """
    prefix = next((prefix for prefix in PACKAGES if name.startswith(prefix)), None)
    if prefix is None:
        NETWORKS[name]
        if pretrained:
            raise BecameError(
                f"there are no pretrained weights of '{name}'; networks of packages, hf:NAME and timm:NAME, have some."
            )
        return None
    source, package = name.removeprefix(prefix), PACKAGES[prefix]
    if not source:
        what = "a name that timm knows" if package == "timm" else "a folder, or a name on the hub"
        raise BecameError(f"'{prefix}' is followed by no name; give {what}.")
    if norm != "batch":
        raise BecameError(f"the network '{name}' has norms of its own, and none that could be '{norm}'.")
    return HubNetwork(source, pretrained, package)


def build_network(name: str, shape: tuple[int, ...], norm: Norm = "batch") -> Architecture:
    """Return the network of that name for images of this shape [C, H, W] or text [L], with this kind of normalisation.

    Raises:
        BecameError: if there is none, it is for other samples, it has no such normalisation, or images are too small.
    """
    network = NETWORKS[name]
    try:
        inspect.signature(network).bind(*shape, norm)
    except TypeError:
        samples = "text" if len(shape) == 1 else "images"
        raise BecameError(f"the network '{name}' is not for {samples}; choose another --network.") from None
    return network(*shape, norm)
