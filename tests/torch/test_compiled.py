"""Compiled steps: equal to plain ones on the CPU, and captured on a GPU where there is one."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from adapters.networks import build_network
from adapters.torch.compiled import CompiledSteps, placed
from adapters.torch.learner import TorchLearner
from became_core import BecameError
from became_core.continual import (
    SGD,
    Adam,
    Annealed,
    Augmentation,
    Constraint,
    Optimiser,
    Training,
    build_method,
    learn,
)
from became_core.continual.training import epoch_batches
from became_core.projection import GPM
from tests.streams import prototype_stream
from tests.torch.recording import imitate_graphs

# By PyTorch itself, as it first loads its compiler, and as it traces a function of autograd.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

STREAM = prototype_stream(tasks=2)
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"))
TRAINING = Training(Annealed(lr=0.05, epochs=8), Annealed(lr=0.05, epochs=4), batch_size=16, projector_samples=20)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Forget what was compiled, so that no test is refused for another's functions."""
    yield
    torch.compiler.reset()


def _network(is_small: bool) -> nn.Sequential:
    torch.manual_seed(0)
    # Convolutions and batch norm take twenty seconds to compile.
    first = [nn.Linear(36, 64)] if is_small else [nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(nn.Flatten(), *first, nn.Flatten(), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 8))


@pytest.mark.parametrize("way", ["torch.compile", "imitated graphs", GPU])
@pytest.mark.parametrize(
    ("method", "optimiser"),
    [("became", SGD()), ("ewc", SGD(momentum=0.9)), ("became+nscl", Adam()), ("gpm", SGD(momentum=0.9))],
)
def test_compiled_steps_learn_what_plain_steps_learn(
    monkeypatch: pytest.MonkeyPatch, way: str, method: str, optimiser: Optimiser
) -> None:
    if way == "torch.compile" and method != "gpm":
        pytest.skip("a compilation for each method takes long; the graphs have them all")
    if way == "imitated graphs":
        imitate_graphs(monkeypatch)
    rate = 0.005 if isinstance(optimiser, Adam) else 0.05
    training = replace(
        TRAINING,
        optimiser=optimiser,
        augmentation=Augmentation(padding=1),
        stage1=Annealed(lr=rate, epochs=8),
        stage2=Annealed(lr=rate, epochs=4),
    )
    device = "cuda" if way == "cuda" else "cpu"
    plain, compiled = (
        TorchLearner(
            _network(way == "torch.compile"),
            STREAM,
            device=device,
            dtype="float64",
            dropout_masks="framework",
            compiled=compiles,
        )
        for compiles in (False, True)
    )
    records = [
        learn(learner, STREAM, build_method(method, {"threshold": 0.8}), training) for learner in (plain, compiled)
    ]
    expected, found = (learner.parameters() for learner in (plain, compiled))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].cpu(), value.cpu(), rtol=1e-7, atol=1e-9, err_msg=name)
    assert np.allclose(records[1].accuracy[-1], records[0].accuracy[-1])


def test_the_batches_of_an_epoch_are_placed_as_they_are() -> None:
    rng = np.random.default_rng(0)
    rates = np.linspace(0.1, 0.0, 99)
    for augmentation in (None, Augmentation(padding=1)):
        batches = epoch_batches(STREAM.tasks[:1], 16, rng, augmentation)
        there = list(placed(batches, rates[: len(batches)], torch.device("cpu")))
        assert len(there) == len(batches) > 1
        for (own, rate), batch, expected in zip(there, batches, rates, strict=False):
            assert (own.task, rate) == (batch.task, expected)
            np.testing.assert_array_equal(own.indices, batch.indices)
            assert (own.views is None) == (batch.views is None)
            if own.views is not None and batch.views is not None:
                np.testing.assert_array_equal(own.views.offsets, batch.views.offsets)
                np.testing.assert_array_equal(own.views.flips, batch.views.flips)


def test_steps_hold_for_the_same_constraint_alone() -> None:
    projector, names = GPM(threshold=0.9), frozenset({"a.weight"})
    constraint = Constraint(names, projector)
    steps = CompiledSteps(constraint, SGD(), torch.device("cpu"))
    assert steps.hold_for(replace(constraint), SGD())
    assert not steps.hold_for(replace(constraint, projector=GPM(threshold=0.9)), SGD())
    assert not steps.hold_for(replace(constraint, trainable=names | {"b.weight"}), SGD())
    assert not steps.hold_for(constraint, Adam())


def test_masks_of_numpy_are_refused() -> None:
    with pytest.raises(BecameError, match="--dropout-masks framework"):
        TorchLearner(build_network("alexnet", (3, 32, 32)), prototype_stream(channels=3, side=32), compiled=True)
