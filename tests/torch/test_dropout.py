"""Dropout from a NumPy stream, or from PyTorch."""

import numpy as np
import pytest
import torch

from adapters.torch.dropout import Dropout, use_stream
from adapters.torch.learner import TorchLearner
from adapters.torch.networks import Described
from tests.dropout import check_framework_masks


def _dropped(shape: tuple[int, ...], seed: int, p: float = 0.25) -> torch.Tensor:
    layer = Dropout(p)
    use_stream(layer, np.random.default_rng(seed))
    result: torch.Tensor = layer(torch.ones(shape))
    return result


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_right_fraction_survives_and_the_mean_is_kept(p: float) -> None:
    dropped = _dropped((400, 500), 0, p)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 1 / (1 - p)], abs=1e-4)
    assert abs((dropped == 0).double().mean().item() - p) < 5e-3
    assert abs(dropped.double().mean().item() - 1) < 1e-2


def test_masks_are_a_function_of_the_stream() -> None:
    assert torch.equal(_dropped((7, 3), 1), _dropped((7, 3), 1))
    assert not torch.equal(_dropped((70, 3), 1), _dropped((70, 3), 2))


def test_a_mask_does_not_depend_on_how_images_lie_in_memory() -> None:
    images = torch.ones(2, 3, 4, 5)
    masks = []
    for layout in (torch.contiguous_format, torch.channels_last):
        layer = Dropout(0.5)
        use_stream(layer, np.random.default_rng(0))
        masks.append(layer(images.contiguous(memory_format=layout)))
    assert torch.equal(*masks)


def test_evaluation_drops_nothing() -> None:
    layer = Dropout(0.5).eval()
    inputs = torch.randn(5)
    assert layer(inputs) is inputs


def test_pytorch_draws_masks_if_it_is_asked_to() -> None:
    check_framework_masks(lambda network, stream, masks: TorchLearner(Described(network), stream, dropout_masks=masks))
