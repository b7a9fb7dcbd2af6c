"""The catalogue of data sets, tests/data_sets.py, on this backend."""

from typing import Any

import pytest

from adapters.jax.learner import JaxLearner
from became_core.continual import TaskStream
from tests.data_sets import STREAMS, check_it_is_learned, check_logits


def make(backbone: Any, stream: TaskStream) -> JaxLearner:
    return JaxLearner(backbone, stream)


@pytest.mark.parametrize("name", STREAMS)
def test_its_images_are_normalised_and_its_targets_are_the_tasks_own(name: str) -> None:
    check_logits(make, name)


# Each compiles for seconds; runs on one data set of the others' kinds are in the tests of conformance.
@pytest.mark.parametrize("name", ["fewer classes later"])
def test_it_is_learned(name: str) -> None:
    check_it_is_learned(make, name)
