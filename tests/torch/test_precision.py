"""Mixed precision on PyTorch."""

import pytest
import torch

from adapters.torch.learner import TorchLearner
from adapters.torch.networks import Described
from adapters.torch.run import prepare
from tests.precision import check_mixed_precision


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(
        lambda network, stream, mixed: TorchLearner(Described(network), stream, mixed_precision=mixed)
    )


def test_a_run_convolves_float32_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    prepare()
    assert not torch.backends.cudnn.allow_tf32
