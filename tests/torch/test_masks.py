"""Masks on convolutional networks with batch statistics, dropout and pooling; and what HAT refuses."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters.torch.learner import TorchLearner
from became_core import BecameError
from became_core.continual import Annealed, Training, build_method, learn
from became_core.projection import UnitGraph
from tests.conformance.learners import listened, unit_graph_of
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=3, classes_per_task=2, channels=3, side=8)
TRAINING = Training(Annealed(0.05, 2), Annealed(0.05, 1), batch_size=16)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 2, bias=False),
        nn.BatchNorm2d(12, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 20),
        nn.BatchNorm1d(20, track_running_stats=False),
        nn.ReLU(),
    )


def learner_of(backbone: nn.Module) -> TorchLearner:
    torch.manual_seed(0)
    for layer in backbone.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
    return TorchLearner(backbone, STREAM)


class Block(nn.Module):
    """A basic block, whose shortcut is a convolution or nothing."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, filters, 3, padding=1, bias=False), norm(filters)
        self.conv2, self.bn2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False), norm(filters)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(channels, filters, 1, bias=False), norm(filters))
            if channels != filters
            else nn.Identity()
        )

    def forward(self, images: Tensor) -> Tensor:
        body = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(images)))))
        result: Tensor = torch.relu(body + self.shortcut(images))
        return result


def norm(filters: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(filters, track_running_stats=False)


def residual() -> nn.Sequential:
    stem = nn.Conv2d(3, 6, 3, bias=False)
    return nn.Sequential(stem, norm(6), nn.ReLU(), Block(6, 6), Block(6, 10), nn.AvgPool2d(2), nn.Flatten())


@pytest.mark.parametrize("backbone", [network, residual])
@pytest.mark.parametrize("name", ["packnet", "hat"])
def test_an_old_tasks_logits_keep_their_bits(name: str, backbone: Callable[[], nn.Module]) -> None:
    learner = learner_of(backbone())
    said, observe = listened(learner, STREAM)
    settings = {"hat_sharpness": 50.0, "hat_sparsity": 0.1}
    record = learn(learner, STREAM, build_method(name, settings), TRAINING, callbacks=[Listening(observe)])
    for task in range(2):
        for later in range(task + 1, 3):
            assert any(np.array_equal(said[task][task][-1], now) for now in said[later][task])
            assert record.accuracy[later, task] == record.accuracy[task, task]
    last = [name for name in record.ranks[0] if name in learner.projectable][-1]
    used = [ranks[last] for ranks in record.ranks]
    assert used[0][0] < used[-1][0] <= used[-1][1]


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 10))


class Product(nn.Module):
    """Units of two layers multiplied: each says how much of the other is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(192, 10), nn.Linear(192, 10), nn.Linear(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        images = images.flatten(1)
        result: Tensor = torch.relu(self.third(self.first(images) * (1 + torch.relu(self.second(images).sum(1, True)))))
        return result


class Gated(nn.Module):
    """Units that are seen by a layer, and multiplied by what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 10), nn.Linear(10, 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        found = torch.relu(self.first(images.flatten(1)))
        result: Tensor = found * self.second(found)
        return result


def test_units_that_are_multiplied_one_by_one_are_all_sources() -> None:
    found = unit_graph_of(learner_of(Gated()), STREAM.tasks[0])
    assert found.sources == ((), ("first.weight",), ("first.weight", "second.weight"))


@pytest.mark.parametrize(
    ("backbone", "pair"),
    [
        (Product, r"'third\.weight' does not read those of 'second\.weight'"),
        (layer_norm, r"'4\.weight' does not read those of '1\.weight'"),
    ],
)
def test_a_network_whose_units_mix_is_refused(backbone: Callable[[], nn.Module], pair: str) -> None:
    with pytest.raises(BecameError, match=f"HAT gates units, and {pair} one by one"):
        learn(learner_of(backbone()), STREAM, build_method("hat"), TRAINING)


def test_the_wiring_of_a_convolutional_network_is_that_of_a_row() -> None:
    layers, heads = ("0.weight", "5.weight", "9.weight"), tuple(f"heads.{task}.weight" for task in range(3))
    expected = UnitGraph(layers, ((), *((layer,) for layer in layers)), heads)
    assert unit_graph_of(learner_of(network()), STREAM.tasks[0]) == expected


def test_the_wiring_of_residual_blocks_has_sums() -> None:
    found = unit_graph_of(learner_of(residual()), STREAM.tasks[1])
    assert dict(zip([*found.layers, "head"], found.sources, strict=True)) == {
        "0.weight": (),
        "3.conv1.weight": ("0.weight",),
        "3.conv2.weight": ("3.conv1.weight",),
        "4.conv1.weight": ("0.weight", "3.conv2.weight"),
        "4.conv2.weight": ("4.conv1.weight",),
        "4.shortcut.0.weight": ("0.weight", "3.conv2.weight"),
        "head": ("4.conv2.weight", "4.shortcut.0.weight"),
    }
