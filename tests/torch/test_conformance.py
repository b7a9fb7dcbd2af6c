"""The PyTorch learner keeps the promises that every framework's learner makes, on networks of each kind of layer."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from adapters.networks import Architecture
from adapters.torch.learner import TorchLearner
from adapters.torch.run import BACKEND
from became_core.continual import Learner, TaskStream
from tests.conformance import CHECKS, Make, convolutional, linear
from tests.dropout import check_framework_masks
from tests.norms import CHECKS as NORM_CHECKS
from tests.norms import MakeNormalised
from tests.precision import check_mixed_precision


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
        return TorchLearner(describe(stream), stream, device=torch.get_default_device(), dtype="float64", seed=seed)

    return make


MAKES: dict[str, Make] = {"linear": described(linear), "convolutional": described(convolutional), "own": own}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check: Callable[[Make], None], make: str) -> None:
    check(MAKES[make])


@pytest.mark.timeout(1200)  # each compiles what it runs
@pytest.mark.parametrize("check", NORM_CHECKS)
def test_normalisation(check: Callable[[MakeNormalised], None]) -> None:
    check(lambda network, stream: TorchLearner(network, stream, dtype="float64"))


def test_the_framework_draws_masks_if_it_is_asked_to() -> None:
    check_framework_masks(lambda network, stream, masks: TorchLearner(network, stream, dropout_masks=masks))


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(lambda network, stream, mixed: TorchLearner(network, stream, mixed_precision=mixed))


def test_a_run_convolves_float32_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    BACKEND.prepare()
    assert not torch.backends.cudnn.allow_tf32
