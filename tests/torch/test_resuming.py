"""A PyTorch run that is interrupted is the uninterrupted one to the bit, single precision and any layout included."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from adapters.networks import DropoutMasks
from adapters.runs import Checkpoints
from adapters.torch.learner import TorchLearner
from adapters.torch.networks import Dropout
from became_core.continual import (
    SGD,
    Adam,
    Annealed,
    Optimiser,
    RunState,
    Training,
    build_method,
    learn,
)
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=2, per_class=12, channels=3, side=8)


def new_learner(seed: int, dropout_masks: DropoutMasks) -> TorchLearner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        convolutions = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU()]
        convolutions.append(Dropout(0.2))
        backbone = nn.Sequential(*convolutions, nn.Conv2d(16, 8, 3), nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(32))
        return TorchLearner(backbone, STREAM, dropout_masks=dropout_masks, seed=seed)


@pytest.mark.parametrize(
    ("method", "optimiser", "masks"),
    [
        ("became", SGD(momentum=0.9), "framework"),
        ("became+trgp", SGD(), "numpy"),
        ("ewc+ogd", Adam(), "numpy"),
    ],
)
def test_a_convolutional_run_goes_on_exactly(
    method: str, optimiser: Optimiser, masks: DropoutMasks, tmp_path: Path
) -> None:
    """The network's weights lie channels last, those from a file do not."""
    training = Training(Annealed(0.01, 1), Annealed(0.01, 1), batch_size=9, optimiser=optimiser)
    built = build_method(method, {"threshold": 0.9, "ogd_samples": 6, "ogd_capacity": 6})
    saved: list[Checkpoints] = []

    def keep(state: RunState) -> None:
        saved.append(Checkpoints(tmp_path / str(len(saved)), STREAM, built, training))
        saved[-1].save(state)

    learner = new_learner(0, masks)
    expected = learn(learner, STREAM, built, training, callbacks=[Listening(keep=keep)])
    for kept in saved[1:]:
        other = new_learner(1, masks)
        found = learn(other, STREAM, built, training, state=kept.load(other))
        np.testing.assert_array_equal(found.accuracy, expected.accuracy)
        assert found.alpha == expected.alpha
        assert found.ranks == expected.ranks
        for name, value in learner.parameters().items():
            assert torch.equal(other.parameters()[name], value), name
