"""Users' own models: what each framework's tests write out in its own layers, and what holds of them all."""

from collections.abc import Callable
from typing import Any

import numpy as np

from adapters.networks import (
    Architecture,
    Backbone,
    BatchNorm,
    Convolution,
    Dropout,
    Flatten,
    Linear,
    MaxPool,
    ReLU,
    Residual,
)
from became_core.arrays import Params
from became_core.continual import Annealed, Learner, TaskStream, Training, build_method, learn
from became_core.continual.measurement import Measurement
from tests.backends import to_numpy
from tests.streams import prototype_stream

__all__ = [
    "DESCRIPTION",
    "IMAGE",
    "check_it_has_the_taps_of_its_description",
    "check_it_learns_as_its_description",
    "check_it_learns_from",
    "check_it_was_looked_at",
]

IMAGE = (2, 8, 8)
DESCRIPTION = Architecture(
    (
        *(Convolution("conv1", 4, 3, padding=1, bias=True), BatchNorm("bn1", running=True), ReLU(), Dropout(0.25)),
        *(Residual((Convolution("conv2", 4, 3, padding=1),)), MaxPool(2)),
        *(Convolution("conv3", 6, 2, stride=2, bias=True), Flatten(), Linear("fc1", 7, bias=True), ReLU()),
    ),
    IMAGE,
)
STREAM = prototype_stream(tasks=2, channels=2, side=8)
TRAINING = Training(Annealed(lr=0.1, epochs=2), Annealed(lr=0.1, epochs=1), batch_size=10)

# (backbone, tasks, seed) -> a learner.
MakeLearner = Callable[[Any, TaskStream, int], Learner]


def check_it_learns_as_its_description(make: MakeLearner, backbone: Backbone) -> None:
    """The same parameters, masks, accuracies and, to single precision, weights after a whole run."""
    assert dict(backbone.parameters) == dict(DESCRIPTION.parameters)
    assert backbone.masks == DESCRIPTION.masks
    ours, theirs = (make(each, STREAM, 3) for each in (backbone, DESCRIPTION))
    ours.assign(theirs.parameters())
    method = build_method("became", {"threshold": 0.9})
    records = [learn(learner, STREAM, method, TRAINING, seed=5) for learner in (ours, theirs)]
    np.testing.assert_array_equal(records[0].accuracy, records[1].accuracy)
    found = ours.parameters()
    for name, value in theirs.parameters().items():
        np.testing.assert_allclose(to_numpy(found[name]), to_numpy(value), rtol=2e-4, atol=2e-5, err_msg=name)


def check_it_has_the_taps_of_its_description(make: MakeLearner, backbone: Backbone) -> None:
    """The same true Fisher information, which every tap takes part in."""
    learners = [make(each, STREAM, 3) for each in (backbone, DESCRIPTION)]
    learners[0].assign(learners[1].parameters())
    ours, theirs = (
        Measurement(learner, STREAM.tasks[0], TRAINING, "true", 0, "merge").diagonal().values for learner in learners
    )
    for name, value in theirs.items():
        np.testing.assert_allclose(to_numpy(ours[name]), to_numpy(value), rtol=1e-3, atol=1e-6, err_msg=name)


def check_it_was_looked_at(learner: Any) -> None:
    """A learner has compared a user's own network with other ways to compute the same, which one table shows."""
    compared = [finding.what for finding in learner.checked.findings]
    assert compared == [
        "outputs of the user's own pass, in evaluation",
        "outputs of the user's own pass, in training",
        "outputs, computed twice",
        "outputs of a sample alone",
        "gradients of single samples",
        *(["outputs if matrices move where the sample reads nothing"] if len(compared) == 7 else []),
        f"a derivative, by {learner.checked.findings[-1].what.removeprefix('a derivative, by ')}",
    ]
    assert all(line.endswith("as it should be") for line in str(learner.checked).splitlines()[2:])


def check_it_learns_from(initial: dict[str, Any], learner: Learner, stream: TaskStream, training: Training) -> Params:
    """A network of a user's own begins with the weights it has, and all of them move; its parameters are returned."""
    check_it_was_looked_at(learner)
    before = learner.parameters()
    for name, value in initial.items():
        np.testing.assert_array_equal(before[name], value)
    record = learn(learner, stream, build_method("became"), training)
    assert record.alpha[1] is not None
    assert 0 <= record.alpha[1] <= 1
    after = learner.parameters()
    moved = {name for name, value in after.items() if not np.array_equal(value, before[name])}
    assert set(before) - learner.running_statistics <= moved
    return after
