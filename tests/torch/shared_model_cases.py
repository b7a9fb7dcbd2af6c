"""Models of ``test_shared_model.py`` as its processes wrap them, what they learn, and on which batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from became_core.laplace import Calibrated, DiagonalFisher
from became_core.projection import GPM, NSCL
from tests.torch.modules import CLASSES, WIDTH, Stored

__all__ = [
    "CASES",
    "Case",
    "Encoder",
    "Experts",
    "batches",
    "convolutional",
    "perceptron",
    "plain",
    "sharded",
    "wrapped",
]


class Encoder(nn.Module):
    """Attention, whose output layer is never called, and a scale that no known operation explains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, dropout=0.0)
        self.scale = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.layer(torch.stack([x, x.cos(), x * x], 1)).mean(1)
        outputs: Tensor = self.head(mean * self.scale.cumsum(0).sum().tanh())
        return outputs


class Experts(nn.Module):
    """Each sample goes through one of two layers, and looks a word up in one of two embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(2))
        self.words = nn.ModuleList(nn.Embedding(WIDTH, 4) for _ in range(2))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 4)
        for layer, words, chosen in zip(self.layers, self.words, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            if chosen.any():
                own = x[chosen]
                hidden = hidden.index_copy(0, chosen.nonzero()[:, 0], layer(own) + words(own.argmax(1)))
        outputs: Tensor = self.head(hidden.tanh())
        return outputs


def perceptron() -> nn.Module:
    """Of the second layer's one row and of the last one's three, two processes have unequal parts."""
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1), nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, CLASSES)
    )


def convolutional() -> nn.Module:
    layers = nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.GroupNorm(2, 4), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, CLASSES))


def by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


class Case(NamedTuple):
    """A network and how it learns."""

    network: Callable[[], nn.Module]
    settings: dict[str, Any]
    one_stored: bool = False  # whether the first weight is stored as [d_in, d_out]


CASES = {
    "perceptron": Case(perceptron, {"projector": GPM(0.8), "calibration": "across"}),
    "convolution, true Fisher": Case(convolutional, {"fisher": "true", "projector": NSCL(), "uncovered": "frozen"}),
    "encoder": Case(Encoder, {"estimator": Calibrated(), "uncovered": "free"}),
    "stored": Case(Stored, {"likelihood": "gaussian", "estimator": DiagonalFisher()}, True),
    "own loss": Case(convolutional, {"likelihood": by_hand}),
}


def batches(seed: int, gaussian: bool) -> list[tuple[Tensor, Tensor]]:
    """Five batches of unequal sizes: one process has three of them, and the other two."""
    generator = torch.Generator().manual_seed(seed)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64) + seed
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        return inputs, nn.functional.one_hot(labels, CLASSES).double() if gaussian else labels

    return [batch(size) for size in (8, 6, 4, 10, 8)]


def wrapped(model: Any, how: str, case: Case) -> Any:
    if how == "DDP":
        return DistributedDataParallel(model)
    if how == "FSDP2":
        first = model.weight if isinstance(model, Stored) else None
        along: Any = (
            {"shard_placement_fn": lambda value: Shard(1) if value is first else None} if case.one_stored else {}
        )
        inner = model.layer if isinstance(model, Encoder) else model[-1] if isinstance(model, nn.Sequential) else None
        if inner is not None:
            fully_shard(inner)
        fully_shard(model, **along)
    return model


def sharded(model: nn.Module, **options: Any) -> Any:
    """The same module, sharded; its declared type lacks what a module has."""
    return fully_shard(model, **options)


def plain(value: Any) -> Any:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype=float)
