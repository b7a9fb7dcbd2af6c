"""Mixed precision on TensorFlow."""

from adapters.tensorflow.learner import TensorFlowLearner
from tests.precision import check_mixed_precision


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(lambda network, stream, mixed: TensorFlowLearner(network, stream, mixed_precision=mixed))
