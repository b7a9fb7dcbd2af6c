"""What mixed precision promises, for any adapter's learner in float32."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from adapters.networks import Architecture, BatchNorm, Convolution, Flatten, Linear, MaxPool, ReLU
from became_core.continual import (
    SGD,
    Annealed,
    Batch,
    Constraint,
    Learner,
    TaskStream,
    Training,
    build_method,
    learn,
    random_generator,
)
from became_core.continual.measurement import Measurement
from became_core.projection import GPM
from tests.backends import to_numpy
from tests.streams import prototype_stream

__all__ = ["check_a_run_learns", "check_mixed_precision"]

# (network, tasks, whether precision is mixed) -> a learner, its weights by seed 0.
MakeMixed = Callable[[Any, TaskStream, bool], Learner]
NETWORK = Architecture(
    (
        *(Convolution("conv1", 6, 3, bias=True), BatchNorm("bn1"), ReLU(), MaxPool(2), Flatten()),
        *(Linear("fc1", 20), ReLU(), Linear("fc2", 12, bias=True), ReLU()),
    ),
    (2, 8, 8),
)
STREAM = prototype_stream(tasks=2, channels=2, side=8)


def check_a_run_learns(make: MakeMixed, network: Any) -> None:
    """By rounded products, to weights in single precision."""
    learner, training = make(network, STREAM, True), Training(Annealed(0.1, 20), Annealed(0.1, 1), batch_size=10)
    record = learn(learner, STREAM, build_method("finetune"), training)
    assert record.accuracy.diagonal().mean() > 80  # chance is 33
    assert {to_numpy(value).dtype.name for value in learner.parameters().values()} == {"float32"}


def check_mixed_precision(make: MakeMixed, network: Any = NETWORK) -> None:
    """Steps are taken by rounded products; nothing else is rounded, and what is protected stays so to float32.

    Args:
        make: a learner.
        network: of images [2, 8, 8], as the learner takes it.
    """
    stream = STREAM
    plain, mixed = (make(network, stream, each) for each in (False, True))
    task, training = stream.tasks[1], Training(Annealed(0.1, 1), Annealed(0.1, 1), projector_samples=5, batch_size=30)
    measured = Measurement(mixed, stream.tasks[0], training, "empirical", 0, "posterior")
    memory = GPM(0.5).remember(measured)
    same = replace(measured, learner=plain)
    assert measured.loss() == same.loss()
    for name, value in measured.diagonal().values.items():
        np.testing.assert_array_equal(to_numpy(value), to_numpy(same.diagonal().values[name]))
    before = {name: to_numpy(value) for name, value in mixed.parameters().items()}
    batches = [Batch(1, task.train[start : start + 12]) for start in range(0, 48, 12)]
    rates = np.full(len(batches), 0.05)
    moved = []
    for learner in (plain, mixed):
        constraint = Constraint(learner.projectable | learner.heads[1], projector=memory)
        loss = learner.train(
            batches, rates, constraint, SGD().initial(learner.parameters()), random_generator(0, "x")
        ).loss
        assert isinstance(loss, float)
        after = {name: to_numpy(value) for name, value in learner.parameters().items()}
        assert all(value.dtype == np.float32 for value in after.values())
        moved.append({name: after[name] - before[name] for name in constraint.trainable})
    exact, rounded = moved
    for name, step in exact.items():
        share = np.linalg.norm(rounded[name] - step) / np.linalg.norm(step)
        assert 1e-4 < share < 0.25, (name, share)  # of 8 bits, after a batch norm and ReLUs, some per cent are left
    for name, basis in memory.bases.items():
        step = rounded[name].reshape(len(rounded[name]), -1)
        assert np.abs(step @ to_numpy(basis)).max() <= 1e-5 * np.linalg.norm(step), name
