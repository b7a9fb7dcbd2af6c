"""The catalogue of data sets, tests/data_sets.py, on this backend."""

from typing import Any

import pytest

from adapters.tensorflow.learner import TensorFlowLearner
from became_core.continual import TaskStream
from tests.data_sets import LEARNED, STREAMS, check_it_is_learned, check_logits


def make(backbone: Any, stream: TaskStream) -> TensorFlowLearner:
    return TensorFlowLearner(backbone, stream)


@pytest.mark.parametrize("name", STREAMS)
def test_its_images_are_normalised_and_its_targets_are_the_tasks_own(name: str) -> None:
    check_logits(make, name)


@pytest.mark.parametrize("name", LEARNED)
def test_it_is_learned(name: str) -> None:
    check_it_is_learned(make, name)
