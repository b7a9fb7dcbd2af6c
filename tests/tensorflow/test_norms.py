"""Batch norm, with running statistics or without, and group norm on TensorFlow."""

from collections.abc import Callable

import pytest
import tensorflow as tf

from adapters.networks import Architecture
from adapters.tensorflow.learner import TensorFlowLearner
from became_core.continual import Learner, TaskStream
from tests.norms import CHECKS, MakeNormalised


def make(architecture: Architecture, stream: TaskStream) -> Learner:
    return TensorFlowLearner(architecture, stream, dtype=tf.float64)


@pytest.mark.timeout(1200)  # each compiles what it runs
@pytest.mark.parametrize("check", CHECKS)
def test_normalisation(check: Callable[[MakeNormalised], None]) -> None:
    check(make)
