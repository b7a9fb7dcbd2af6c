"""``Continual`` around what the user has compiled: a model, and the step of an optimiser."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from adapters.torch import Continual
from became_core import Secant
from tests.torch.modules import CLASSES
from tests.torch.own_loop import new_data, new_network, train

# Of PyTorch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def test_a_model_that_is_compiled_is_remembered_by_its_own_names(tmp_path: Path) -> None:
    model, batches = new_network("perceptron"), new_data(1)
    fast: Any = torch.compile(model, backend="eager")
    plain, compiled = Continual(model, check=False), Continual(fast, check=False)
    for each in (plain, compiled):
        each.remember(batches)
    assert str(plain.coverage) == str(compiled.coverage)
    compiled.save(tmp_path / "memory.safetensors")
    assert str(Continual.load(model, tmp_path / "memory.safetensors").coverage) == str(plain.coverage)
    assert str(Continual.load(fast, tmp_path / "memory.safetensors").coverage) == str(plain.coverage)


def test_a_model_whose_parts_are_compiled_one_by_one_is_learned_by_its_own_names(tmp_path: Path) -> None:
    reports, weights, tables = [], [], []
    for compiles in (False, True):
        first: Any = new_network("perceptron")
        first = torch.compile(first, backend="eager") if compiles else first
        model = torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Linear(CLASSES, CLASSES)).double()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        learning = Continual(model, estimator=Secant())
        learning.remember(new_data(1))
        with learning.stable(optimizer):
            train(model, optimizer, new_data(2))
        with learning.plastic():
            train(model, optimizer, new_data(2))
        reports.append(learning.merge(new_data(2)))
        learning.remember(new_data(2))
        file = tmp_path / f"{compiles}.safetensors"
        learning.save(file)
        weights.append([value.detach() for value in model.parameters()])
        tables += [str(Continual.load(model, path).coverage) for path in sorted(tmp_path.iterdir())]
    assert len(set(tables)) == 1
    assert 0 < reports[0].alpha < 1
    assert reports[1].alpha == pytest.approx(reports[0].alpha, rel=1e-9)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)


def test_a_step_that_is_compiled_is_projected_as_others_are() -> None:
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = new_network("perceptron")
        learning, optimizer = Continual(model, check=False), torch.optim.Adam(model.parameters(), 0.01)
        learning.remember(new_data(1))
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        with learning.stable(optimizer):
            for inputs, targets in new_data(2):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
                step()
        results.append([value.detach() for value in model.parameters()])
    # Steps of 0.01; a compiled Adam corrects its bias in float32.
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
