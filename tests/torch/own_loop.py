"""Networks, data and a loop of training that tests of ``Continual`` share, in double precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.torch.modules import CLASSES, WIDTH, Stored

__all__ = ["NETWORKS", "GroupedAdam", "Pairs", "follows_new_data", "new_data", "new_network", "train", "whole"]

# A test whose batch norms follow the new data in stable training, as it knows.
follows_new_data = pytest.mark.filterwarnings("ignore:the running statistics of:UserWarning")


class _Encoder(nn.Module):
    """Attention over three tokens, with a linear layer for the result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, dropout=0.0)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.layer(torch.stack([x, x.cos(), x * x], 1)).mean(1))
        return outputs


class _Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell, self.head = kind(WIDTH, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.cell(torch.stack([x, x.cos(), x * x], 1))[0][:, -1])
        return outputs


class _Words(nn.Module):
    """Looks up rows of an embedding, many of which no input of one batch does."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(21, 3), nn.Linear(3 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        keys = (5 * x).round().clamp(-10, 10).long() + 10
        outputs: Tensor = self.head(self.words(keys).tanh().flatten(1))
        return outputs


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)),
    "convolutional": _convolutional,
    "encoder": _Encoder,
    "GRU": lambda: _Recurrent(nn.GRU),
    "LSTM": lambda: _Recurrent(nn.LSTM),
    "stored": Stored,
    "words": _Words,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 8)), nn.Tanh(), nn.Linear(8, CLASSES)
    ),
}


Pairs = list[tuple[Tensor, Tensor]]


def new_network(name: str) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def new_data(seed: int, batches: int = 2, size: int = 2) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, WIDTH, dtype=torch.float64, generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Pairs, epochs: int = 3) -> None:
    model.train()
    for _ in range(epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets, label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def whole(batches: Pairs) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


class GroupedAdam(torch.optim.Optimizer):
    """Steps by gradients over the root of their second moments, and counts steps by the group, as apex's Adam does."""

    def __init__(self, parameters: Any, rate: float) -> None:
        super().__init__(parameters, {"lr": rate, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            beta, group["step"] = group["betas"][1], group.get("step", 0) + 1
            for value in group["params"]:
                second = self.state[value].setdefault("exp_avg_sq", torch.zeros_like(value))
                second.lerp_(value.grad**2, 1 - beta)
                value.addcdiv_(value.grad, (second / (1 - beta ** group["step"])).sqrt() + 1e-8, value=-group["lr"])
