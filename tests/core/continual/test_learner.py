"""The direction of a step with relative learning rates, with a penalty on some parameters, and with both."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core.arrays import Params
from became_core.continual import SGD, Adam, Constraint, Optimiser, Penalty
from became_core.laplace import Diagonal, LaplacePosterior
from became_core.projection import GPM
from tests.backends import to_numpy
from tests.projections import Finished

RELATIVE = st.sampled_from([0.25, 2.0, 20.0])
OPTIMISERS = SGD(), SGD(momentum=0.5, weight_decay=0.1), Adam(weight_decay=0.1)


def some(xp: Any, seed: int) -> Params:
    """Two weights [3, 4], a scale [3] and a head [2, 3]."""
    draw = np.random.default_rng(seed)
    shapes = {"fc1.weight": (3, 4), "fc2.weight": (3, 4), "norm.weight": (3,), "heads.0.weight": (2, 3)}
    return {name: xp.asarray(draw.normal(size=shape), dtype=xp.float64) for name, shape in shapes.items()}


def moves(constraint: Constraint, optimiser: Optimiser, theta: Params, gradients: list[Params], rate: float) -> Params:
    """Return how far every parameter moves in steps with these gradients."""
    at, optimiser = theta, optimiser.initial(theta)
    for gradient in gradients:
        directions, optimiser = constraint.directions(gradient, at, rate, optimiser)
        at = {name: value - rate * directions[name] for name, value in at.items()}
    return {name: to_numpy(at[name]) - to_numpy(value) for name, value in theta.items()}


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@given(relative=RELATIVE, rate=st.sampled_from([0.01, 0.1]), seed=st.integers(0, 9))
def test_a_relative_rate_acts_like_another_rate_for_its_parameters_alone(
    xp: Any, optimiser: Optimiser, penalised: bool, relative: float, rate: float, seed: int
) -> None:
    """These parameters move as if the whole step had that rate, and all others as if there were no relative rate."""
    theta, others = some(xp, seed), some(xp, seed + 100)
    gradients = [some(xp, seed + step) for step in (200, 300)]
    gram = xp.asarray(np.diag([1.0, 1.0, 0.0, 0.0]), dtype=xp.float64)
    memory = GPM(0.9).remember(Finished({"fc1.weight": gram, "fc2.weight": gram}, {}))
    posterior = LaplacePosterior(others, Diagonal({name: value * value for name, value in theta.items()}))
    plain = Constraint(frozenset(theta), memory, Penalty(posterior, 3.0) if penalised else None)
    moved = ("fc1.weight", "norm.weight")
    result = moves(replace(plain, relative=dict.fromkeys(moved, relative)), optimiser, theta, gradients, rate)
    at_its_rate = moves(plain, optimiser, theta, gradients, rate * relative)
    as_it_was = moves(plain, optimiser, theta, gradients, rate)
    for name, move in result.items():
        expected = at_its_rate if name in moved else as_it_was
        np.testing.assert_allclose(move, expected[name], rtol=1e-10, atol=1e-12)
        assert np.abs(move).max() > 0
    np.testing.assert_allclose(result["fc1.weight"][:, :2], 0, atol=1e-10)


@given(seed=st.integers(0, 9), strength=st.sampled_from([0.5, 200.0]))
def test_a_parameter_without_a_mean_is_not_penalised(xp: Any, seed: int, strength: float) -> None:
    theta, gradients = some(xp, seed), [some(xp, seed + 1)]
    of_norms = {"norm.weight": theta["norm.weight"] + 1}
    penalty = Penalty(LaplacePosterior(of_norms, Diagonal({"norm.weight": theta["norm.weight"] ** 2 + 1})), strength)
    penalised = moves(Constraint(frozenset(theta), penalty=penalty), SGD(), theta, gradients, 0.1)
    free = moves(Constraint(frozenset(theta)), SGD(), theta, gradients, 0.1)
    for name, move in penalised.items():
        assert np.array_equal(move, free[name]) == (name != "norm.weight")
    assert np.all(
        penalised["norm.weight"] > free["norm.weight"]
    )  # The mean is larger, and the penalty draws the weight to it.
