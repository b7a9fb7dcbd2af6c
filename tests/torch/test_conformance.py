"""The PyTorch learner keeps the learner protocol's promises, on networks of each kind of layer."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from adapters.networks import Architecture
from adapters.torch.learner import TorchLearner
from adapters.torch.networks import Described
from became_core.continual import Learner, TaskStream
from tests.conformance import CHECKS, Make, convolutional, linear


def own(stream: TaskStream, seed: int) -> Learner:
    """A module of the user's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        convolution = nn.Conv2d(stream.dataset.images.shape[1], 4, 3, padding=1, stride=2, bias=False)
        backbone = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(7))
        backbone(torch.zeros(1, *stream.dataset.images.shape[1:]))
        return TorchLearner(
            backbone.double(), stream, device=torch.get_default_device(), dtype=torch.float64, seed=seed
        )


def described(describe: Callable[[TaskStream], Architecture]) -> Make:
    def make(stream: TaskStream, seed: int) -> Learner:
        backbone = Described(describe(stream), seed, torch.float64)
        return TorchLearner(backbone, stream, device=torch.get_default_device(), dtype=torch.float64, seed=seed)

    return make


MAKES: dict[str, Make] = {"linear": described(linear), "convolutional": described(convolutional), "own": own}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check: Callable[[Make], None], make: str) -> None:
    check(MAKES[make])
