"""Batch norm, with running statistics or without, and group norm on JAX."""

from collections.abc import Callable

import pytest

from adapters.jax.learner import JaxLearner
from adapters.networks import Architecture
from became_core.continual import Learner, TaskStream
from tests.norms import CHECKS, MakeNormalised


def make(architecture: Architecture, stream: TaskStream) -> Learner:
    return JaxLearner(architecture, stream, dtype="float64")


@pytest.mark.timeout(1200)  # each compiles what it runs
@pytest.mark.parametrize("check", CHECKS)
def test_normalisation(check: Callable[[MakeNormalised], None]) -> None:
    check(make)
