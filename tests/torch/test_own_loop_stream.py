"""Changes of a stream that ``Continual`` observes, and the sample of earlier data that it keeps."""

import math

import pytest
import torch

from adapters.torch import Continual
from became_core import BecameError
from became_core.continual import Reservoir
from tests.torch.modules import CLASSES, WIDTH
from tests.torch.own_loop import Pairs, new_data, new_network, train


def _arriving(changed_at: int, batches: int) -> Pairs:
    """Batches whose labels are of another rule from one place on."""
    generator, rule = torch.Generator().manual_seed(3), torch.randn(WIDTH, CLASSES, dtype=torch.float64)
    pairs = []
    for place in range(batches):
        inputs = torch.randn(16, WIDTH, dtype=torch.float64, generator=generator)
        pairs.append((inputs, (inputs @ (rule if place < changed_at else -rule)).argmax(1)))
    return pairs


def test_a_change_of_the_stream_is_observed_and_a_sample_of_what_came_before_is_there() -> None:
    model = new_network("perceptron")
    learning, optimizer = Continual(model, check=False), torch.optim.Adam(model.parameters(), 0.02)
    learning.reservoir = Reservoir(8)
    stream, observed = _arriving(120, 200), []
    for place, batch in enumerate(stream):
        if learning.observe(batch):
            observed.append(place)
            before = learning.reservoir.batches
        train(model, optimizer, [batch], 1)
    assert len(observed) == 1
    assert 122 <= observed[0] <= 130
    assert len(before) == 8
    assert all(any(batch is earlier for earlier in stream[:120]) for batch in before)
    # What is stored afterwards is of the new rule.
    assert all(any(batch is later for later in stream[observed[0] :]) for batch in learning.reservoir.batches)
    learning.remember(before)
    with learning.stable(optimizer):
        train(model, optimizer, [stream[-1]], 1)


def test_nothing_is_observed_in_a_stream_that_stays_as_it_is() -> None:
    model = new_network("perceptron")
    learning, optimizer = Continual(model), torch.optim.Adam(model.parameters(), 0.02)
    for batch in _arriving(200, 200):
        assert not learning.observe(batch)
        train(model, optimizer, [batch], 1)
    assert learning.reservoir.offered > 190


def test_observing_changes_neither_the_model_nor_its_mode() -> None:
    model = new_network("convolutional").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning = Continual(model)
    for batch in new_data(0, batches=25, size=4):
        learning.observe(batch)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_is_no_observation() -> None:
    model = new_network("perceptron")
    learning = Continual(model)
    for batch in new_data(0, batches=20):
        learning.observe(batch)
    model[2].weight.data[0] = math.nan
    with pytest.raises(BecameError, match="a loss that is watched for changes is not finite"):
        learning.observe(new_data(1)[0])
