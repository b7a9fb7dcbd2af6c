"""Dropout whose masks JAX draws."""

from adapters.jax.learner import JaxLearner
from tests.dropout import check_framework_masks


def test_jax_draws_masks_if_it_is_asked_to() -> None:
    check_framework_masks(lambda network, stream, masks: JaxLearner(network, stream, dropout_masks=masks))
