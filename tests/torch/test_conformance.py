"""The PyTorch learner keeps the learner protocol's promises, on networks of each kind of layer."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from adapters.torch.learner import TorchLearner
from became_core.continual import Learner, TaskStream
from tests.conformance import CHECKS, Make


def _learner(backbone: Callable[[int], nn.Module], stream: TaskStream, seed: int) -> Learner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TorchLearner(backbone(stream.dataset.images[0].size).double(), stream, dtype=torch.float64, seed=seed)


def linear(stream: TaskStream, seed: int) -> Learner:
    return _learner(lambda pixels: nn.Sequential(nn.Flatten(), nn.Linear(pixels, 9), nn.Tanh()), stream, seed)


def convolutional(stream: TaskStream, seed: int) -> Learner:
    channels = stream.dataset.images.shape[1]
    return _learner(
        lambda _: nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1, stride=2, bias=False), nn.Tanh(), nn.Flatten(), nn.LazyLinear(7)
        ),
        stream,
        seed,
    )


@pytest.mark.parametrize("make", [linear, convolutional])
@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check: Callable[[Make], None], make: Make) -> None:
    check(make)
