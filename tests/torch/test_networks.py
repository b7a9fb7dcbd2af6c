"""Described networks as modules, heads, and dropout by a NumPy generator."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.networks import NETWORKS, Architecture, BatchNorm, Flatten, Latent, Linear, build_network, initial_values
from adapters.torch.networks import Described, Drawing, Dropout, MultiHead, draw_masks_from

# The transformers take bytes, and the autoencoder pixels and noise; test_text.py and test_vae.py look at them.
OF_IMAGES = [name for name in NETWORKS.names if not name.startswith(("gpt", "vae"))]


@pytest.mark.parametrize("name", OF_IMAGES)
def test_parameters_go_by_their_canonical_names_and_begin_as_drawn(name: str) -> None:
    network = build_network(name, (3, 24, 25))
    parameters = dict(Described(network, seed=5).named_parameters())
    expected = initial_values(5, network.parameters)
    assert list(parameters) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(parameters[key].detach().numpy(), value.astype(np.float32))


def test_weights_in_double_precision_are_drawn_so() -> None:
    network = MultiHead(Described(build_network("mlp", (1, 3, 3)), 5, torch.float64), 100, [3, 3], 5, torch.float64)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
    for value in network.parameters():
        assert not torch.equal(value, value.float().double())


@pytest.mark.parametrize("name", OF_IMAGES)
def test_it_gives_as_many_features_as_described_and_keeps_no_statistics(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, (3, 22, 25))
    module = Described(network).eval()
    images = torch.randn(3, 3, 22, 25)
    features = module(images)
    assert features.shape == (3, network.width)
    assert not list(module.buffers())
    copied = copy.deepcopy(module)
    torch.testing.assert_close(copied(images), features)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(images).any()
    torch.testing.assert_close(module(images), features)  # a copy is a network of its own


def test_a_batch_norm_knows_whether_it_sees_images() -> None:
    network = Architecture((BatchNorm("a", epsilon=0.5), Flatten(), Linear("fc", 3), BatchNorm("b")), (2, 3, 3))
    kinds = [(type(module), module.eps) for module in Described(network).steps if isinstance(module, nn.BatchNorm2d)]
    assert kinds == [(nn.BatchNorm2d, 0.5)]
    assert isinstance(Described(network).b, nn.BatchNorm1d)


def test_heads_are_separate_and_stacked_in_task_order() -> None:
    torch.manual_seed(0)
    network = MultiHead(Described(build_network("mlp", (1, 8, 8))), 100, [2, 2, 2]).eval()
    images = torch.randn(4, 1, 8, 8)
    every = network(images)
    assert every.shape == (4, 3, 2)
    for task in range(3):
        torch.testing.assert_close(every[:, task], network(images, task))


def _dropped(shape: tuple[int, ...], seed: int, p: float = 0.25) -> torch.Tensor:
    layer = Dropout(p)
    draw_masks_from(layer, np.random.default_rng(seed))
    result: torch.Tensor = layer(torch.ones(shape))
    return result


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_right_fraction_survives_and_the_mean_is_kept(p: float) -> None:
    dropped = _dropped((400, 500), 0, p)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 1 / (1 - p)], abs=1e-4)
    assert abs((dropped == 0).double().mean().item() - p) < 5e-3
    assert abs(dropped.double().mean().item() - 1) < 1e-2


def test_masks_are_a_function_of_the_generator() -> None:
    assert torch.equal(_dropped((7, 3), 1), _dropped((7, 3), 1))
    assert not torch.equal(_dropped((70, 3), 1), _dropped((70, 3), 2))


def test_a_mask_does_not_depend_on_how_images_lie_in_memory() -> None:
    images = torch.ones(2, 3, 4, 5)
    masks = []
    for layout in (torch.contiguous_format, torch.channels_last):
        layer = Dropout(0.5)
        draw_masks_from(layer, np.random.default_rng(0))
        masks.append(layer(images.contiguous(memory_format=layout)))
    assert torch.equal(*masks)


def test_a_part_of_a_batch_has_its_part_of_the_noise() -> None:
    """As where processes share a batch: new noise in training, the whole batch's, and the samples' own otherwise."""
    architecture = Architecture((Flatten(), Latent()), (6, 1, 1))
    module, inputs = Described(architecture, dtype=torch.float64), torch.randn(4, 6, 1, 1, dtype=torch.float64)
    mean, log_variance, noise = inputs[:, :, 0, 0].chunk(3, dim=1)
    torch.testing.assert_close(module.eval()(inputs), mean + (log_variance / 2).exp() * noise)
    module.train()
    draw_masks_from(module, np.random.default_rng(0))
    whole = module(inputs)
    drawn = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 2)))
    torch.testing.assert_close(whole, mean + (log_variance / 2).exp() * drawn)
    draw_masks_from(module, np.random.default_rng(0))
    (latent,) = (layer for layer in module.modules() if isinstance(layer, Drawing))
    latent.part = 4, slice(1, 3)
    torch.testing.assert_close(module(inputs[1:3]), whole[1:3])


def test_evaluation_drops_nothing() -> None:
    layer = Dropout(0.5).eval()
    inputs = torch.randn(5)
    assert layer(inputs) is inputs


@torch.no_grad()
def test_preact_resnet18_computes_what_its_paper_has() -> None:
    """Written out by PyTorch's functions: the shortcut begins behind a block's first norm."""
    described = Described(build_network("preact_resnet18", (3, 8, 8)))
    weights = dict(described.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.batch_norm(x, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True)

    def convolution(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        return functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    for value in weights.values():  # norms have weights of 1 and 0 at first
        value.add_(0.1 * torch.rand(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = convolution(images, "conv1")
    for stage in range(1, 5):
        for index in range(2):
            name, stride = f"stage{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            x = norm(x, f"{name}.bn1")
            inner = x.relu()
            shortcut = x if stride == 1 else convolution(inner, f"{name}.shortcut.0", stride)
            inner = norm(convolution(inner, f"{name}.conv1", stride), f"{name}.bn2").relu()
            x = convolution(inner, f"{name}.conv2") + shortcut
    expected = norm(x, "bn_last").relu().mean((2, 3))
    torch.testing.assert_close(described(images), expected, rtol=1e-4, atol=1e-4)
