"""Optimisers against their formulas and those of PyTorch, and the direction of a step under a constraint."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.arrays import Params
from became_core.continual import SGD, Adam, Constraint, Optimiser, Penalty
from became_core.laplace import Diagonal, LaplacePosterior
from became_core.projection import GPM
from tests.backends import to_numpy
from tests.projections import Finished

NUMBERS = st.lists(st.floats(-2, 2, width=16), min_size=3, max_size=3)
STEPS = st.lists(NUMBERS, min_size=1, max_size=4)


def run(xp: Any, optimiser: Optimiser, gradients: list[list[float]], theta: list[float], rate: float) -> np.ndarray:
    """Return a weight [3] after steps with these gradients."""
    at = {"weight": xp.asarray(theta, dtype=xp.float64)}
    optimiser = optimiser.initial(at)
    for gradient in gradients:
        directions, optimiser = optimiser.step({"weight": xp.asarray(gradient, dtype=xp.float64)}, at)
        at = {name: value - rate * directions[name] for name, value in at.items()}
    return np.asarray(to_numpy(at["weight"]))


@given(gradients=STEPS, theta=NUMBERS, momentum=st.sampled_from([0.0, 0.5, 0.9]), decay=st.sampled_from([0.0, 0.1]))
def test_sgd_agrees_with_its_formula(
    xp: Any, gradients: list[list[float]], theta: list[float], momentum: float, decay: float
) -> None:
    expected, velocity = np.array(theta), np.zeros(3)
    for gradient in gradients:
        velocity = momentum * velocity + np.array(gradient) + decay * expected
        expected = expected - 0.5 * velocity
    result = run(xp, SGD(momentum=momentum, weight_decay=decay), gradients, theta, rate=0.5)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


@given(gradients=STEPS, theta=NUMBERS, decay=st.sampled_from([0.0, 0.1]))
def test_adam_agrees_with_its_formula(xp: Any, gradients: list[list[float]], theta: list[float], decay: float) -> None:
    expected, m, v = np.array(theta), np.zeros(3), np.zeros(3)
    for t, gradient in enumerate(gradients, start=1):
        g = np.array(gradient) + decay * expected
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        expected = expected - 0.5 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
    adam = Adam(beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=decay)
    np.testing.assert_allclose(run(xp, adam, gradients, theta, rate=0.5), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("ours", "name", "options"),
    [
        (SGD(momentum=0.9, weight_decay=0.01), "SGD", {"momentum": 0.9, "weight_decay": 0.01}),
        (Adam(weight_decay=0.01), "Adam", {"weight_decay": 0.01}),
    ],
)
def test_optimisers_agree_with_those_of_pytorch(xp: Any, ours: Optimiser, name: str, options: dict[str, float]) -> None:
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    theta, gradients = draw.normal(size=3).tolist(), draw.normal(size=(5, 3)).tolist()
    weight = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    theirs = getattr(torch.optim, name)([weight], lr=0.1, **options)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        theirs.step()
    expected = weight.detach().cpu().numpy()
    np.testing.assert_allclose(run(xp, ours, gradients, theta, rate=0.1), expected, rtol=1e-9)


def test_a_step_does_not_change_the_optimiser(xp: Any) -> None:
    theta = {"weight": xp.asarray([1.0, 2.0])}
    for optimiser in (SGD(momentum=0.5).initial(theta), Adam().initial(theta)):
        first, _ = optimiser.step({"weight": xp.asarray([1.0, -1.0])}, theta)
        again, _ = optimiser.step({"weight": xp.asarray([1.0, -1.0])}, theta)
        np.testing.assert_array_equal(to_numpy(first["weight"]), to_numpy(again["weight"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(momentum=1.0), r"^the optimiser's momentum is 1\.0; it must be at least 0 and below 1\.$"),
        (lambda: SGD(weight_decay=-1), r"^the weight decay is -1; it must be at least 0 and finite\.$"),
        (lambda: Adam(beta2=-0.1), r"^the optimiser's beta2 is -0\.1; "),
    ],
)
def test_optimiser_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        make()


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


def test_adam_learns_in_bfloat16(xp: Any) -> None:
    """There beta2 is 1, so that what is missing of the second moment must be kept wider."""
    if not hasattr(xp, "bfloat16"):
        pytest.skip("this backend has no bfloat16")
    theta = {"w": xp.astype(xp.ones((2,)), xp.bfloat16)}
    adam = Adam().initial(theta)
    for _ in range(3):
        directions, adam = adam.step({"w": theta["w"]}, theta)
        assert directions["w"].dtype == xp.bfloat16
        np.testing.assert_allclose(to_numpy(xp.astype(directions["w"], xp.float32)), 1, rtol=0.02)


@given(seed=st.integers(0, 9))
def test_a_parameter_without_a_precision_is_not_penalised(xp: Any, seed: int) -> None:
    theta, gradients = some(xp, seed), [some(xp, seed + 1)]
    posterior = LaplacePosterior(theta, Diagonal({"norm.weight": theta["norm.weight"] ** 2 + 1}))
    moved = {"norm.weight": theta["norm.weight"] + 1}
    penalised = moves(
        Constraint(frozenset(theta), penalty=Penalty(posterior, 3.0)), SGD(), theta | moved, gradients, 0.1
    )
    free = moves(Constraint(frozenset(theta)), SGD(), theta | moved, gradients, 0.1)
    for name, move in penalised.items():
        assert np.array_equal(move, free[name]) == (name != "norm.weight")
