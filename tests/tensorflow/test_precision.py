"""Mixed precision on TensorFlow."""

import tensorflow as tf

from adapters.tensorflow.learner import TensorFlowLearner
from adapters.tensorflow.run import prepare
from tests.precision import check_mixed_precision


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(lambda network, stream, mixed: TensorFlowLearner(network, stream, mixed_precision=mixed))


def test_a_run_multiplies_float32_as_such() -> None:
    tf.config.experimental.enable_tensor_float_32_execution(True)
    prepare()
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
