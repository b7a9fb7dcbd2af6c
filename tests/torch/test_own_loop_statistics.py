"""Running statistics of a model in its own loop: who says that they changed, and how they are estimated anew."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from adapters.torch import Continual
from became_core import BecameError
from tests.torch.modules import CLASSES, WIDTH
from tests.torch.own_loop import follows_new_data, new_data, new_network, train


def test_batch_norms_that_follow_the_new_data_are_named() -> None:
    """No weight needs to move for old outputs to change with them; in evaluation mode they stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    learning = Continual(model, uncovered="frozen")
    inputs = torch.randn(16, 8)
    learning.remember([(inputs, torch.arange(16) % CLASSES)])
    with pytest.warns(UserWarning, match="statistics of '1' have changed in stable") as seen:  # noqa: SIM117
        with learning.stable(optimizer):
            model.train()(inputs + 1)
    assert seen[0].filename == __file__
    with learning.stable(optimizer):
        model.train()[1].eval()
        model(inputs + 1)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm1d])
def test_statistics_of_every_norm_that_has_some_are_estimated_and_watched(norm: Any) -> None:
    layers = nn.Unflatten(1, (2, 3)), norm(2, affine=True, track_running_stats=True), nn.Flatten()
    model, old, new = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)).double(), new_data(1), new_data(2, 3, 4)
    learning, optimizer = Continual(model, check=False), torch.optim.SGD(model.parameters(), 0.05)
    learning.remember(old)
    model.train()
    with pytest.warns(UserWarning, match="the running statistics of '1' have changed"), learning.stable(optimizer):
        train(model, optimizer, new)
    with learning.plastic():
        train(model, optimizer, new)
    momentum = layers[1].momentum
    learning.merge(new, statistics=new)
    rows = torch.stack([inputs for inputs, _ in new]).reshape(3, -1, 2, 3)
    torch.testing.assert_close(layers[1].running_mean, rows.mean((0, 1, 3)))
    assert layers[1].momentum == momentum


@follows_new_data
def test_running_statistics_are_estimated_again_on_request() -> None:
    model, old, new = new_network("convolutional"), new_data(1, 2, 8), new_data(2, 3, 8)
    norm: Any = model[2]
    learning = Continual(model)
    learning.remember(old)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with learning.stable(optimizer):
        train(model, optimizer, new)
    with learning.plastic():
        train(model, optimizer, new)
    learning.merge(new, statistics=new)
    with torch.no_grad():
        seen = [model[1](model[0](x)) for x, _ in new]
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    assert norm.momentum == 0.1
    assert all(module.training for module in model.modules())


@follows_new_data
def test_a_merge_whose_statistics_fail_can_be_repeated() -> None:
    model, old, new = new_network("convolutional"), new_data(1, 2, 8), new_data(2, 3, 8)
    learning, optimizer = Continual(model), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(old)
    with learning.stable(optimizer):
        train(model, optimizer, new)
    with learning.plastic():
        train(model, optimizer, new)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = copy.deepcopy(learning)
    broken = [(torch.full((8, WIDTH), math.nan).double(), new[0][1]), "no batch"]
    for statistics, message in (([], "no batch to estimate"), (broken, "a batch is a str")):
        with pytest.raises(BecameError, match=message):
            learning.merge(new, statistics=statistics)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batches = iter(new)  # one iterator serves both
    report, expected = learning.merge(batches, statistics=batches), twin.merge(new, statistics=new)
    assert report.alpha == expected.alpha
    for name, value in twin.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    with pytest.raises(BecameError, match="a merge is of two models"):
        learning.merge(new)
