"""Masks on convolutional networks with batch statistics, dropout and pooling; and what HAT refuses."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters.torch.learner import TorchLearner
from became_core import BecameError
from became_core.continual import Annealed, MethodSettings, Training, build_method, learn
from became_core.continual.rows import layers_in_a_row
from tests.conformance import listened
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


@pytest.mark.parametrize("name", ["packnet", "hat"])
def test_an_old_tasks_logits_keep_their_bits(name: str) -> None:
    learner = learner_of(network())
    said, observe = listened(learner, STREAM)
    settings = MethodSettings(hat_sharpness=50.0, hat_sparsity=0.1)
    record = learn(learner, STREAM, build_method(name, settings), TRAINING, callbacks=[Listening(observe)])
    for task in range(2):
        for later in range(task + 1, 3):
            assert any(np.array_equal(said[task][task][-1], now) for now in said[later][task])
            assert record.accuracy[later, task] == record.accuracy[task, task]
    used = [ranks["3.weight" if "3.weight" in ranks else "5.weight"] for ranks in record.ranks]
    assert used[0][0] < used[-1][0] <= used[-1][1]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(192, 10)
        self.second = nn.Linear(10, 10)
        self.third = nn.Linear(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        found = torch.relu(self.first(images.flatten(1)))
        found = found + torch.relu(self.second(found))
        result: Tensor = torch.relu(self.third(found))
        return result


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 10))


@pytest.mark.parametrize(
    ("backbone", "pair"),
    [
        (Residual, r"'third\.weight' does not see the units of 'second\.weight'"),
        (layer_norm, r"'4\.weight' does not see the units of '1\.weight'"),
    ],
)
def test_a_network_whose_layers_are_not_in_a_row_is_refused(backbone: Callable[[], nn.Module], pair: str) -> None:
    with pytest.raises(BecameError, match=f"layers are in a row: {pair}"):
        learn(learner_of(backbone()), STREAM, build_method("hat", MethodSettings()), TRAINING)


def test_the_layers_of_a_convolutional_network_are_in_a_row() -> None:
    order, heads = layers_in_a_row(learner_of(network()), STREAM.tasks[0])
    assert order == ("0.weight", "5.weight", "9.weight")
    assert heads == ("heads.0.weight", "heads.1.weight", "heads.2.weight")
