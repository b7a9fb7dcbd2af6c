"""Dropout whose masks TensorFlow draws."""

from adapters.tensorflow.learner import TensorFlowLearner
from tests.dropout import check_framework_masks


def test_tensorflow_draws_masks_if_it_is_asked_to() -> None:
    check_framework_masks(lambda network, stream, masks: TensorFlowLearner(network, stream, dropout_masks=masks))
