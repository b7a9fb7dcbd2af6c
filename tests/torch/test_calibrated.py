"""How a loop of the user's own calibrates old curvature, against finite differences and per-sample gradients."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import Continual
from became_core import Secant
from tests.torch.oracle import autograd_gradients, kappa_by_brute_force, secant_by_brute_force

WIDTH, CLASSES = 6, 3

Batches = list[tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def batches(seed: int, count: int = 4) -> Batches:
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, WIDTH, generator=rng, dtype=torch.float64)
    return list(zip(inputs, torch.randint(0, CLASSES, (count, 8), generator=rng), strict=True))


def train(model: nn.Module, data: Batches, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for inputs, targets in data * epochs:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def weights(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def way(begin: Weights, end: Weights) -> Weights:
    return {name: end[name] - value for name, value in begin.items()}


def learn(model: nn.Module, learning: Continual, data: Batches) -> tuple[Weights, Weights]:
    """Train in both stages, and return theta_gp and theta_hat."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with learning.stable(optimizer):
        for inputs, targets in data:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    theta_gp = weights(model)
    with learning.plastic():
        train(model, data, 6)
    return theta_gp, weights(model)


def fisher(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> Weights:
    inputs, targets = (torch.cat(side) for side in zip(*data, strict=True))
    return {name: rows.square().mean(0) for name, rows in autograd_gradients(model, inputs, targets).items()}


def assert_precision(learning: Continual, expected: Weights) -> None:
    assert learning.posterior is not None
    for name, value in learning.posterior.precision.diagonal().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-14)


def scaled(*terms: tuple[float, Weights]) -> Weights:
    return {name: sum(factor * each[name] for factor, each in terms) for name in terms[0][1]}  # type: ignore[misc]


def assert_merged_at_the_minimum(
    model: nn.Module, learning: Continual, ends: tuple[Weights, Weights], data: Batches, kappa: float | None
) -> None:
    b, c = secant_by_brute_force(model, *ends, learning, data, kappa)
    report = learning.merge(data)
    assert report.alpha == pytest.approx(min(max(-b / c, 0.0), 1.0), rel=1e-5)
    assert 0 < report.alpha < 1


def test_each_data_set_is_calibrated_along_the_movement_before_its_own() -> None:
    model, (first, second, third) = new_model(), map(batches, (1, 2, 3))
    initial, learning = weights(model), Continual(model)
    train(model, first, 6)
    learning.remember(first)
    movement, one = way(initial, weights(model)), fisher(model, first)
    assert_precision(learning, one)
    ends = learn(model, learning, second)
    of_first = kappa_by_brute_force(model, ends[0], movement, second)
    assert_merged_at_the_minimum(model, learning, ends, second, of_first)
    assert_precision(learning, scaled((of_first, one)))
    learning.remember(iter(second))
    two, of_second = fisher(model, second), kappa_by_brute_force(model, weights(model), movement, second)
    assert_precision(learning, scaled((of_first, one), (of_second, two)))
    movement = way(*ends)
    ends = learn(model, learning, third)
    assert_merged_at_the_minimum(model, learning, ends, third, 1.0)
    learning.remember(third)
    of_third = kappa_by_brute_force(model, weights(model), movement, third)
    assert_precision(learning, scaled((of_first, one), (of_second, two), (of_third, fisher(model, third))))
    assert min(abs(kappa - 1) for kappa in (of_first, of_second, of_third)) > 0.01


def test_a_model_that_was_trained_before_is_calibrated_from_the_second_merge_on() -> None:
    model, (first, second, third) = new_model(), map(batches, (1, 2, 3))
    train(model, first, 6)
    learning = Continual(model)
    learning.remember(first)
    one = fisher(model, first)
    ends = learn(model, learning, second)
    assert_merged_at_the_minimum(model, learning, ends, second, None)  # by kappa along its own movement
    learning.remember(second)
    old, movement = scaled((1.0, one), (1.0, fisher(model, second))), way(*ends)
    assert_precision(learning, old)
    ends = learn(model, learning, third)
    kappa = kappa_by_brute_force(model, ends[0], movement, third)
    assert_merged_at_the_minimum(model, learning, ends, third, kappa)
    assert_precision(learning, scaled((kappa, old)))


def test_with_an_estimator_of_the_users_own_nothing_is_calibrated_nor_kept(tmp_path: Path) -> None:
    model, (first, second) = new_model(), map(batches, (1, 2))
    learning = Continual(model, estimator=Secant())
    train(model, first, 6)
    learning.remember(first)
    ends = learn(model, learning, second)
    assert_merged_at_the_minimum(model, learning, ends, second, None)
    learning.remember(second)
    learning.save(tmp_path / "memory")
    assert {name.split(".")[0] for name in load_file(tmp_path / "memory")} == {"mean", "fisher", "projector"}


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_file_has_what_calibrates(tmp_path: Path, is_merged: bool) -> None:
    """A memory that is saved, also between a merge and the next ``remember``, goes on as the one that was not."""
    memories, reports = [], []
    for is_saved in (False, True):
        model, (first, second, third) = new_model(), map(batches, (1, 2, 3))
        learning = Continual(model)
        train(model, first, 6)
        learning.remember(first)
        if is_merged:
            learn(model, learning, second)
            learning.merge(second)
        if is_saved:
            learning.save(tmp_path / "memory")
            learning = Continual.load(model, tmp_path / "memory")
        if is_merged:
            learning.remember(second)
        learn(model, learning, third)
        reports.append(learning.merge(third).alpha)
        learning.remember(third)
        assert learning.posterior is not None
        memories.append(learning.posterior.precision.diagonal())
    assert reports[0] == pytest.approx(reports[1], rel=1e-12)
    for name, value in memories[0].items():
        torch.testing.assert_close(memories[1][name], value, rtol=1e-12, atol=0)


def test_a_file_of_an_earlier_version_is_read_and_calibrates_nothing_at_the_first_merge(tmp_path: Path) -> None:
    model, (first, second) = new_model(), map(batches, (1, 2))
    train(model, first, 6)
    learning, file = Continual(model), tmp_path / "memory"
    learning.remember(first)
    learning.save(file)
    with safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()["became"])
    assert description.pop("calibrated") is False
    save_file(load_file(file), file, {"became": json.dumps(description | {"format": 1})})
    again = Continual.load(model, file)
    ends = learn(model, again, second)
    assert_merged_at_the_minimum(model, again, ends, second, None)


def test_a_model_may_be_made_without_values_or_moved_before_it_is_trained() -> None:
    first = batches(1)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    learning = Continual(model)
    model.to_empty(device="cpu")
    model.load_state_dict(new_model().state_dict())
    train(model, first, 2)
    learning.remember(first)
    assert_precision(learning, fisher(model, first))


def test_parameters_that_are_new_or_frozen_do_not_move_in_the_movement() -> None:
    model, (first, second) = new_model(), map(batches, (1, 2))
    initial, learning = weights(model), Continual(model)
    train(model, first, 6)
    learning.remember(first)
    movement = way(initial, weights(model))
    model.append(nn.Linear(CLASSES, CLASSES, dtype=torch.float64))
    ends = learn(model, learning, second)
    movement |= {name: torch.zeros_like(value) for name, value in ends[0].items() if name not in movement}
    kappa = kappa_by_brute_force(model, ends[0], movement, second)
    assert learning.posterior is not None
    one = {name: value.clone() for name, value in learning.posterior.precision.diagonal().items()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(ends[1][name])
    learning.merge(second)
    assert_precision(learning, scaled((kappa, one)))
