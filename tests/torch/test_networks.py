"""The backbones of the published protocol: shapes, names and sizes."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from adapters.initial import initial_value
from adapters.torch.networks import MultiHead, build_backbone, draw_weights
from became_core import BecameError


def test_alexnet_has_the_published_layers_and_size() -> None:
    network = MultiHead(build_backbone("alexnet", (3, 32, 32)), 2048, tasks=10, classes=10)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.backbone.named_parameters()}
    assert shapes["conv1.weight"] == (64, 3, 4, 4)
    assert shapes["conv2.weight"] == (128, 64, 3, 3)
    assert shapes["conv3.weight"] == (256, 128, 2, 2)
    assert shapes["fc1.weight"] == (2048, 1024)
    assert shapes["fc2.weight"] == (2048, 2048)
    assert not any(name.endswith("bias") for name in shapes if not name.startswith("bn"))
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == 6.7


def test_heads_are_separate_and_stacked_in_task_order() -> None:
    torch.manual_seed(0)
    network = MultiHead(build_backbone("mlp", (1, 8, 8)), 100, tasks=3, classes=2).eval()
    images = torch.randn(4, 1, 8, 8)
    every = network(images)
    assert every.shape == (4, 3, 2)
    for task in range(3):
        torch.testing.assert_close(every[:, task], network(images, task))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("vgg", (3, 32, 32), "no network 'vgg'; choose from alexnet, mlp"), ("alexnet", (1, 21, 28), "at least 22x22")],
)
def test_unknown_networks_and_small_images_are_named(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(BecameError, match=message):
        build_backbone(name, shape)


def test_alexnet_takes_the_smallest_images_it_promises() -> None:
    network = build_backbone("alexnet", (3, 22, 22)).eval()
    assert network(torch.randn(2, 3, 22, 22)).shape == (2, 2048)


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    """So that every backend can draw the same; in the range of PyTorch's own, normalisation layers the identity."""
    networks = [nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8))) for _ in range(3)]
    for network, seed in zip(networks, (5, 5, 6), strict=True):
        draw_weights(network, seed)
    first, again, other = (dict(network.named_parameters()) for network in networks)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == name.startswith("bn1")
    expected = initial_value(5, "conv1.weight", (8, 3, 3, 3), 27)
    np.testing.assert_array_equal(first["conv1.weight"].detach().numpy(), expected.astype(np.float32))
    assert 0.9 / 27**0.5 < first["conv1.weight"].abs().max() <= 1 / 27**0.5
    assert torch.equal(first["bn1.weight"], torch.ones(8))
    assert torch.equal(first["bn1.bias"], torch.zeros(8))
