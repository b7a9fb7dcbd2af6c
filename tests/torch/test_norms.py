"""Batch norm, with running statistics or without, and group norm on PyTorch."""

from collections.abc import Callable

import pytest
import torch

from adapters.networks import Architecture
from adapters.torch.learner import TorchLearner
from adapters.torch.networks import Described
from became_core.continual import Learner, TaskStream
from tests.norms import CHECKS, MakeNormalised


def make(architecture: Architecture, stream: TaskStream) -> Learner:
    return TorchLearner(Described(architecture, 0, torch.float64), stream, dtype=torch.float64)


@pytest.mark.parametrize("check", CHECKS)
def test_normalisation(check: Callable[[MakeNormalised], None]) -> None:
    check(make)
