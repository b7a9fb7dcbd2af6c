"""What it means that a framework draws dropout's masks itself, for any adapter's learner in float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.networks import Architecture, BatchNorm, Convolution, Dropout, Flatten, Linear, ReLU
from became_core import BecameError
from became_core.continual import SGD, Batch, Constraint, Learner, TaskStream, random_generator
from tests.backends import to_numpy
from tests.streams import prototype_stream

__all__ = ["check_framework_masks"]

STREAM = prototype_stream(tasks=2, channels=2, side=8)
P = 0.25
# (network, tasks, what draws masks) -> a learner, its weights by seed 0.
MakeMasked = Callable[[Architecture, TaskStream, Any], Learner]


def check_framework_masks(make: MakeMasked) -> None:
    """Steps follow the seed, of which alone the host draws; the right share is kept, and scaled up."""
    check_training(make)
    check_what_is_kept(make)
    with pytest.raises(BecameError, match="masks are drawn by 'numpy' or by the 'framework', not by 'torch'"):
        make(Architecture((Flatten(),), (2, 8, 8)), STREAM, "torch")


def check_training(make: MakeMasked) -> None:
    layers = (
        *(Convolution("conv1", 4, 3), BatchNorm("bn1"), ReLU(), Dropout(P), Flatten()),
        *(Linear("fc1", 12), ReLU(), Dropout(P)),
    )
    network, task = Architecture(layers, (2, 8, 8)), STREAM.tasks[0]
    batches = [Batch(0, task.train[start : start + 12]) for start in range(0, 36, 12)]

    def trained(masks: str, seed: int) -> NDArray[Any]:
        learner, stream = make(network, STREAM, masks), random_generator(seed, "dropout")
        theta = learner.parameters()
        learner.train(batches, np.full(3, 0.05), Constraint(frozenset(theta)), SGD().initial(theta), stream)
        if masks == "framework":
            after = random_generator(seed, "dropout")
            after.integers(2**63)
            assert stream.bit_generator.state == after.bit_generator.state
        return to_numpy(learner.parameters()["fc1.weight"])

    first, again, other, of_numpy = (
        trained(*each) for each in (("framework", 1), ("framework", 1), ("framework", 2), ("numpy", 1))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, of_numpy)


def check_what_is_kept(make: MakeMasked) -> None:
    """By what a head sees of images that went through dropout alone."""
    learner = make(Architecture((Flatten(), Dropout(P)), (2, 8, 8)), STREAM, "framework")
    rows, head = STREAM.tasks[0].train[:60], next(iter(learner.heads[0])).removesuffix(".weight")
    (whole,) = (
        to_numpy(taps[head].inputs) for taps in learner.taps(0, rows, 60, "empirical", random_generator(0, "x"))
    )

    def seen(seed: int) -> NDArray[Any]:
        batches = learner.taps(0, rows, 30, "published", random_generator(seed, "x"))
        return np.concatenate([to_numpy(taps[head].inputs).reshape(30, 1, -1) for taps in batches])

    found = seen(1)
    kept = found != 0
    np.testing.assert_allclose(found[kept], whole[kept] / (1 - P), rtol=1e-5)
    share = kept[whole != 0].mean()
    assert abs(share - (1 - P)) <= 4.5 * np.sqrt(P * (1 - P) / np.count_nonzero(whole))
    assert not np.array_equal(kept[:30], kept[30:])
    assert not np.array_equal(kept[:, :, :64], kept[:, :, 64:])
    np.testing.assert_array_equal(found, seen(1))
    assert not np.array_equal(found, seen(2))
