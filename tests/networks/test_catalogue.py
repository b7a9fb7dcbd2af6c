"""The networks of the published protocol: names, shapes and sizes."""

from math import prod

import pytest

from adapters.networks import NETWORKS, BatchNorm, Convolution, GroupNorm, build_network
from became_core import BecameError
from became_core.laplace import is_statistic

# The networks of images, and the side of the smallest image of each.
SMALLEST = {"alexnet": 22, "mlp": 1, "preact_resnet18": 1, "resnet18": 17}


def shapes_of(name: str, *image: int) -> dict[str, tuple[int, ...]]:
    channels, height, width = image
    network = build_network(name, (channels, height, width))
    return {name: parameter.shape for name, parameter in network.parameters.items()}


@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_only_batch_norm_has_biases(name: str) -> None:
    network = build_network(name, (3, 32, 32))
    norms = {layer.name for layer in network.tapped if isinstance(layer, BatchNorm)}
    assert {n for n in network.parameters if n.endswith("bias")} == {f"{norm}.bias" for norm in norms}


@pytest.mark.parametrize("name", ["alexnet", "preact_resnet18", "resnet18"])
def test_kinds_of_normalisation_differ_in_layers_and_names_alone(name: str) -> None:
    batch, running, group = (build_network(name, (3, 32, 32), norm) for norm in ("batch", "running", "group"))
    assert len({len(network.steps) for network in (batch, running, group)}) == 1
    statistics = set(filter(is_statistic, running.parameters))
    norms = [layer for layer in batch.tapped if isinstance(layer, BatchNorm)]
    assert statistics == {f"{layer.name}.{each}" for layer in norms for each in ("running_mean", "running_var")}
    assert {n: each for n, each in running.parameters.items() if n not in statistics} == dict(batch.parameters)
    assert {n.replace("norm", "bn"): each for n, each in group.parameters.items()} == dict(batch.parameters)
    assert set(group.parameters) != set(batch.parameters)  # so that one's checkpoints are none of the other's
    for layer, shape in group.steps:
        assert not isinstance(layer, BatchNorm)
        if isinstance(layer, GroupNorm):
            assert layer.groups(shape[0]) == {20: 4, 40: 8, 80: 16, 160: 32}.get(shape[0], 32)


def test_what_has_no_normalisation_has_none_of_another_kind() -> None:
    with pytest.raises(BecameError, match="the mlp network has no normalisation that could be 'group'; leave the norm"):
        build_network("mlp", (3, 32, 32), "group")


def test_alexnet_has_the_published_layers_and_size() -> None:
    shapes = shapes_of("alexnet", 3, 32, 32)
    assert shapes["conv1.weight"] == (64, 3, 4, 4)
    assert shapes["conv2.weight"] == (128, 64, 3, 3)
    assert shapes["conv3.weight"] == (256, 128, 2, 2)
    assert shapes["fc1.weight"] == (2048, 1024)
    assert shapes["fc2.weight"] == (2048, 2048)
    heads = 10 * [(10, build_network("alexnet", (3, 32, 32)).width)]
    assert round(sum(map(prod, [*shapes.values(), *heads])) / 1e6, 1) == 6.7


def test_resnet18_has_the_published_layers_and_size() -> None:
    """Of miniImageNet's images 3x3 places are left, so that a head is [classes, 9 x 160]."""
    network = build_network("resnet18", (3, 84, 84))
    shapes = shapes_of("resnet18", 3, 84, 84)
    assert network.width == 9 * 160
    assert sum(isinstance(layer, Convolution) for layer in network.tapped) == 17 + 3
    assert shapes["conv1.weight"] == (20, 3, 3, 3)
    assert shapes["layer1.0.conv1.weight"] == shapes["layer1.1.conv2.weight"] == (20, 20, 3, 3)
    for group, (inputs, outputs) in enumerate(((20, 40), (40, 80), (80, 160)), start=2):
        assert shapes[f"layer{group}.0.conv1.weight"] == (outputs, inputs, 3, 3)
        assert shapes[f"layer{group}.0.conv2.weight"] == shapes[f"layer{group}.1.conv1.weight"]
        assert shapes[f"layer{group}.0.shortcut.0.weight"] == (outputs, inputs, 1, 1)
        assert shapes[f"layer{group}.0.shortcut.1.weight"] == (outputs,)
    assert {name.split(".")[0] for name in shapes if "shortcut" in name} == {"layer2", "layer3", "layer4"}
    # The convolutions at each place, and the places' sides: 84 is halved four times, upwards.
    strided = [shape[1] for layer, shape in network.steps if isinstance(layer, Convolution) and layer.stride == 2]
    assert strided == [84, 42, 42, 21, 21, 11, 11]
    assert sum(map(prod, shapes.values())) == 1_093_140


def test_preact_resnet18_has_the_published_layers_and_size() -> None:
    """Without heads, 11.2 M: 17 3x3 convolutions, 3 of shortcuts without norm, and 17 batch norms."""
    network, shapes = build_network("preact_resnet18", (3, 32, 32)), shapes_of("preact_resnet18", 3, 32, 32)
    assert network.width == build_network("preact_resnet18", (3, 64, 64)).width == 512
    assert sum(isinstance(layer, Convolution) for layer in network.tapped) == 17 + 3
    assert sum(isinstance(layer, BatchNorm) for layer in network.tapped) == 17
    strided = [shape[1] for layer, shape in network.steps if isinstance(layer, Convolution) and layer.stride == 2]
    assert strided == [32, 32, 16, 16, 8, 8]
    kernels = 9 * (3 * 64 + 4 * 64**2 + 64 * 128 + 3 * 128**2 + 128 * 256 + 3 * 256**2 + 256 * 512 + 3 * 512**2)
    shortcuts = 64 * 128 + 128 * 256 + 256 * 512
    norms = 2 * (4 * 64 + (64 + 3 * 128) + (128 + 3 * 256) + (256 + 3 * 512) + 512)
    assert sum(map(prod, shapes.values())) == kernels + shortcuts + norms == 11_167_040


@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_a_network_takes_the_smallest_images_it_promises(name: str) -> None:
    side = SMALLEST[name]
    assert build_network(name, (3, side, side + 5)).width > 0
    if side > 1:
        with pytest.raises(BecameError, match=f"the {name} network needs images of at least {side}x{side} pixels, not"):
            build_network(name, (3, side + 5, side - 1))


def test_an_unknown_network_is_named_with_those_there_are() -> None:
    with pytest.raises(BecameError, match=f"no network 'vgg'; choose from {', '.join(sorted(NETWORKS.names))}"):
        build_network("vgg", (3, 32, 32))


def test_the_autoencoder_encodes_pixels_alone_and_draws_by_what_is_left() -> None:
    network = build_network("vae", (800, 1, 1))
    assert {name: parameter.shape for name, parameter in network.parameters.items()} == {
        "encoder.fc1.weight": (200, 784),
        "encoder.fc2.weight": (32, 200),
        "decoder.fc1.weight": (200, 16),
    }
    assert (network.width, network.beside, network.encoding) == (232, 32, "encoder.fc2")
    assert network.masks == (((16,), None),)
    with pytest.raises(BecameError, match=r"rows of pixels and of 16 numbers of noise, .* no images \[1, 28, 28\]"):
        build_network("vae", (1, 28, 28))
    with pytest.raises(BecameError, match="the vae network has no normalisation that could be 'group'"):
        build_network("vae", (800, 1, 1), "group")
