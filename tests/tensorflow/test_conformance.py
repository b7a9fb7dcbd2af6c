"""The TensorFlow learner keeps the learner protocol's promises, on networks of each kind of layer."""

from collections.abc import Callable

import pytest
import tensorflow as tf

from adapters.tensorflow.learner import TensorFlowLearner
from tests.conformance import BACKBONES, CHECKS, Make


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check: Callable[[Make], None], backbone: str) -> None:
    check(lambda stream, seed: TensorFlowLearner(BACKBONES[backbone](stream), stream, dtype=tf.float64, seed=seed))
