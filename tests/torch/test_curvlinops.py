"""Curvature from taps against an independent implementation, curvlinops, on a convolutional network."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from curvlinops import GGNLinearOperator, KFACLinearOperator
from torch import Tensor, nn

from adapters.torch.learner import TorchLearner
from became_core.continual import Annealed, Training
from became_core.continual.measurement import Measurement
from became_core.curvature import FisherKind
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=2, classes_per_task=3, per_class=8, side=8)


@pytest.fixture(name="learner")
def _learner() -> TorchLearner:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(STREAM.dataset.images.shape[1], 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 5, 2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.Tanh(),
    ).double()
    return TorchLearner(backbone, STREAM, dtype=torch.float64)


class _OneTask(nn.Module):
    """The network with the first task's head alone."""

    def __init__(self, learner: TorchLearner) -> None:
        super().__init__()
        self.network = learner.network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images, 0)
        return logits


def _measured(learner: TorchLearner, kind: FisherKind) -> Measurement:
    training = Training(Annealed(0.1, 1), Annealed(0.1, 1), batch_size=5)
    return Measurement(learner, STREAM.tasks[0], training, kind, 0, "posterior")


def _theirs(learner: TorchLearner, operator: Any, **options: Any) -> tuple[list[str], Any]:
    """The names of all parameters that the first task's loss depends on, and an operator on them."""
    model = _OneTask(learner).eval()
    named = {
        name.removeprefix("network.").removeprefix("backbone."): parameter
        for name, parameter in model.named_parameters()
        if "heads.1" not in name
    }
    data = [learner._batch(STREAM.tasks[0].train)]
    loss = nn.CrossEntropyLoss()
    return list(named), operator(model, loss, list(named.values()), data, check_deterministic=False, **options)


def _direction(learner: TorchLearner) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in learner.parameters().items()}


def _assert_same(found: dict[str, Tensor], names: Sequence[str], expected: Sequence[Tensor]) -> None:
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-14)


def test_curvature_along_directions_is_that_of_ggn_vector_products(learner: TorchLearner) -> None:
    names, operator = _theirs(learner, GGNLinearOperator)
    directions = [_direction(learner) for _ in range(2)]
    products = [operator @ [direction[name] for name in names] for direction in directions]
    found = _measured(learner, "empirical").along(directions).curvature
    expected = [
        [sum((u[name] * part).sum() for name, part in zip(names, product, strict=True)) for product in products]
        for u in directions
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_the_true_fisher_is_the_diagonal_of_the_ggn(learner: TorchLearner) -> None:
    names, operator = _theirs(learner, GGNLinearOperator)
    matrix = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    parameters, found = learner.parameters(), _measured(learner, "true").diagonal().diagonal()
    parts = torch.split(torch.diagonal(matrix), [parameters[name].numel() for name in names])
    _assert_same({name: value.flatten() for name, value in found.items()}, names, parts)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("kind", "theirs"), [("empirical", "empirical"), ("true", "type-2")])
def test_kronecker_factors_are_those_of_kfac(learner: TorchLearner, kind: Any, theirs: str, sharing: Any) -> None:
    names, operator = _theirs(learner, KFACLinearOperator, fisher_type=theirs, kfac_approx=sharing)
    precision = _measured(learner, kind).kronecker(sharing)
    assert set(precision.covered()) == set(names)
    direction = _direction(learner)
    _assert_same(precision.apply(direction), names, operator @ [direction[name] for name in names])
