"""The backbones of the published protocol: shapes, names and sizes."""

import pytest
import torch

from adapters.torch.networks import MultiHead, build_backbone
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
