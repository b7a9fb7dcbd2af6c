"""Mixed precision on JAX."""

from adapters.jax.learner import JaxLearner
from tests.precision import check_mixed_precision


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(lambda network, stream, mixed: JaxLearner(network, stream, mixed_precision=mixed))
