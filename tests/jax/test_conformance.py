"""The JAX learner keeps the promises that every framework's learner makes, on networks of each kind of layer."""

from collections.abc import Callable

import pytest

from adapters.jax.learner import JaxLearner
from became_core.continual import Learner, TaskStream
from tests.conformance import BACKBONES, CHECKS, Make, conforms_where_all_is_compiled
from tests.dropout import check_framework_masks
from tests.norms import CHECKS as NORM_CHECKS
from tests.norms import MakeNormalised
from tests.precision import check_mixed_precision


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check: Callable[[Make], None], backbone: str) -> None:
    def make(stream: TaskStream, seed: int) -> Learner:
        return JaxLearner(BACKBONES[backbone](stream), stream, dtype="float64", seed=seed)

    conforms_where_all_is_compiled(check, make, backbone)


@pytest.mark.timeout(1200)  # each compiles what it runs
@pytest.mark.parametrize("check", NORM_CHECKS)
def test_normalisation(check: Callable[[MakeNormalised], None]) -> None:
    check(lambda network, stream: JaxLearner(network, stream, dtype="float64"))


def test_the_framework_draws_masks_if_it_is_asked_to() -> None:
    check_framework_masks(lambda network, stream, masks: JaxLearner(network, stream, dropout_masks=masks))


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(lambda network, stream, mixed: JaxLearner(network, stream, mixed_precision=mixed))
