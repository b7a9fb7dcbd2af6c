"""Steps of an optimizer in JAX that are projected and penalised, in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax import numpy as jnp

from adapters.jax.memory import coverage, remember
from adapters.jax.own_loop import penalty, projected
from became_core.arrays import named_leaves
from became_core.projection import GPM, NSCL, SGP
from tests.jax.own_loop import (
    CLASSES,
    HIDDEN,
    NETWORKS,
    WIDTH,
    cross_entropy,
    new_data,
    new_weights,
    perceptron,
    remembered,
    train,
)

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "AdamW": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05)),
}


@pytest.mark.parametrize(("name", "optimizer"), [("perceptron", "SGD"), ("convolution", "AdamW")])
def test_old_outputs_stand_still_in_steps_that_are_projected(name: str, optimizer: str) -> None:
    """All directions of the old data are protected, and what cannot be protected is frozen; steps are compiled."""
    apply, params = NETWORKS[name]()
    old, new, outputs = new_data(1, 1, 2), new_data(2), jax.jit(apply)
    memory = remember(apply, params, old, projector=GPM(1.0), uncovered="frozen", check=False)
    before = outputs(params, old[0][0])
    moved = train(apply, params, new, optax.chain(OPTIMIZERS[optimizer](), projected(memory, 0.05)))
    np.testing.assert_allclose(outputs(moved, old[0][0]), before, rtol=0, atol=1e-9)
    first = named_leaves(params)
    changed = {key for key, value in named_leaves(moved).items() if not np.array_equal(value, first[key])}
    assert changed
    assert changed <= {p.name for p in coverage(memory).parameters if p.treatment == "protected"}
    free = train(apply, params, new, OPTIMIZERS[optimizer]())
    assert np.abs(np.asarray(outputs(free, old[0][0])) - np.asarray(before)).max() > 1e-3


class _Perceptron(nnx.Module):  # type: ignore[misc] # flax is taken as untyped
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(WIDTH, HIDDEN, param_dtype=float, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, CLASSES, param_dtype=float, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.last(jnp.tanh(self.first(inputs)))


def test_an_optimizer_of_nnx_takes_the_steps_that_are_projected() -> None:
    """It gives a transformation the arrays of the model's variables, and keeps the state in variables of its own."""
    model, old, (new, *_) = _Perceptron(), new_data(1, 1, 2), new_data(2)
    definition, params = nnx.split(model)

    def apply(params: Any, inputs: Any) -> Any:
        return nnx.merge(definition, params)(inputs)

    memory = remember(apply, params, old, projector=GPM(1.0), uncovered="frozen", check=False)
    assert [p.name for p in coverage(memory).parameters if p.treatment == "protected"] == [
        "first.kernel",
        "last.kernel",
    ]
    outputs = jax.jit(apply)
    before, kernel = outputs(params, old[0][0]), np.asarray(model.first.kernel[...])
    optimizer = nnx.Optimizer(model, projected(memory, 0.1, optax.adam(0.1)), wrt=nnx.Param)

    @nnx.jit  # type: ignore[untyped-decorator] # flax is taken as untyped
    def step(model: Any, optimizer: Any, inputs: Any, targets: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: cross_entropy(model(inputs), targets))(model))

    for _ in range(2):
        step(model, optimizer, *new)
    np.testing.assert_allclose(outputs(nnx.state(model), old[0][0]), before, rtol=0, atol=1e-9)
    assert np.abs(np.asarray(model.first.kernel[...]) - kernel).max() > 0.01
    with pytest.warns(UserWarning, match="unfit after clipping"):
        of_moments = remember(apply, nnx.state(model), state=optimizer.opt_state, samples=4)
    second = optimizer.opt_state.inner[0].nu["first"]["bias"][...]
    found = of_moments.posterior.precision.diagonal()["first.bias"]
    np.testing.assert_allclose(found, np.asarray(second) * 4 / (1 - 0.999**2), rtol=1e-6)


@pytest.mark.parametrize("projector", [SGP(0.9), NSCL(), GPM(0.7)])
def test_a_step_is_the_projectors_own_of_the_matrix_as_it_is_multiplied(projector: Any) -> None:
    params = new_weights()
    memory = remember(perceptron, params, new_data(1), projector=projector, check=False)
    transformation = projected(memory, 0.1)
    updates = jax.tree.map(lambda value: jnp.asarray(np.cos(value) / 7), params)
    (found, state) = jax.jit(transformation.update)(updates, transformation.init(params), params)
    kernel, weight = updates["first"]["kernel"], updates["last"]["weight"]
    expected = memory.projector.project({"first.kernel": kernel.T, "last.weight": weight})
    np.testing.assert_allclose(found["first"]["kernel"], expected["first.kernel"].T, rtol=1e-12)
    np.testing.assert_allclose(found["last"]["weight"], expected["last.weight"], rtol=1e-12)
    assert int(state.count) == 1


def test_what_is_not_covered_takes_a_proximal_step_to_the_old_mean() -> None:
    params, away = (jax.tree.map(np.asarray, new_weights(seed)) for seed in (3, 4))
    memory = remember(perceptron, params, new_data(1), penalty=30.0, check=False)
    updates = jax.tree.map(np.cos, away)

    def stepped(rate: Any, memory: Any = memory, steps: int = 1) -> Any:
        transformation = projected(memory, rate)
        state, update = transformation.init(away), jax.jit(transformation.update)
        for _ in range(steps):
            found, state = update(updates, state, away)
        return np.asarray(found["first"]["bias"]) + away["first"]["bias"]

    pull = 0.5 * 30.0 * np.asarray(memory.posterior.precision.diagonal()["first.bias"])
    free = away["first"]["bias"] + updates["first"]["bias"]
    np.testing.assert_allclose(stepped(0.5), (free + pull * params["first"]["bias"]) / (1 + pull), rtol=1e-12)
    np.testing.assert_allclose(stepped(lambda count: 0.5 * count, steps=2), stepped(0.5), rtol=1e-12)
    np.testing.assert_allclose(stepped(0.0), free, rtol=1e-12)
    stiff = replace(memory, penalty=1e12)
    np.testing.assert_allclose(stepped(0.5, stiff), params["first"]["bias"], atol=1e-6)
    np.testing.assert_allclose(stepped(0.5, replace(memory, uncovered="free")), free)


def test_the_penalty_in_a_loss_has_the_gradient_of_the_posterior() -> None:
    params, away = (jax.tree.map(np.asarray, new_weights(seed)) for seed in (3, 4))
    memory = replace(remembered(), penalty=30.0)
    found = jax.jit(jax.grad(penalty, 1))(memory, away)  # the memory is a tree
    given_away = jax.tree.map(jnp.asarray, params)
    after = remember(perceptron, given_away, new_data(1), check=False)
    jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(given_away)
    assert given_away["first"]["bias"].is_deleted()
    assert float(penalty(after, params)) == 0
    for name in ("first", "last"):
        precision = np.asarray(memory.posterior.precision.diagonal()[f"{name}.bias"])
        expected = 30.0 * precision * (away[name]["bias"] - params[name]["bias"])
        np.testing.assert_allclose(found[name]["bias"], expected, rtol=1e-12)
    assert not np.any(found["first"]["kernel"])
    assert float(penalty(replace(memory, uncovered="frozen"), away)) == 0


def test_a_compiled_step_has_the_memory_among_its_arguments() -> None:
    """A constant would be compiled into the step, for each memory anew."""
    params, memory = new_weights(), remembered()
    transformation = projected(memory, 0.1)
    state = transformation.init(params)
    jaxpr = jax.make_jaxpr(transformation.update)(params, state, params)
    assert max((np.size(const) for const in jaxpr.consts), default=0) <= 1
    assert any(np.shape(leaf) == (WIDTH, memory.projector.rank["first.kernel"][0]) for leaf in jax.tree.leaves(state))


def test_the_state_of_steps_goes_to_bytes_and_back() -> None:
    """Libraries that write states take tuples, dicts and arrays; some refuse arrays without entries."""
    params, old = new_weights(), new_data(1)
    memory = remember(perceptron, params, old, projector=GPM(1.0), check=False)
    assert not all(value.size for value in named_leaves(memory.projector).values())
    optimizer = projected(memory, 0.05, optax.adam(0.05))
    gradients = jax.tree.map(jnp.ones_like, params)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    assert all(leaf.size for leaf in jax.tree.leaves(state))
    again = serialization.from_bytes(optimizer.init(params), serialization.to_bytes(state))
    expected, found = (optimizer.update(gradients, own, params)[0] for own in (state, again))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)


def test_steps_keep_the_dtype_of_the_parameters() -> None:
    params = jax.tree.map(lambda value: np.asarray(value, jnp.bfloat16), new_weights())
    transformation = projected(remembered(), 0.1)
    updates, _ = jax.jit(transformation.update)(params, transformation.init(params), params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(updates)} == {"bfloat16"}


def test_a_state_says_which_of_its_trees_are_those_of_parameters() -> None:
    """So that optax places an optimizer's state beside the parameters, on whatever devices these are."""
    params = new_weights()
    optimizer = projected(remembered(), 0.1, optax.adamw(0.05))
    state, names = optimizer.init(params), {path: {kind: kind for kind in leaf} for path, leaf in params.items()}
    told = optax.tree_utils.tree_map_params(
        optimizer, lambda _, name: name, state, names, transform_non_params=lambda _: None
    )
    (adam,) = (part for part in jax.tree.leaves(told.inner, is_leaf=is_adam) if is_adam(part))
    assert adam.mu == adam.nu == names
    assert jax.tree.leaves(told.spaces) == jax.tree.leaves(told.penalised) == []


def is_adam(value: Any) -> bool:
    return isinstance(value, optax.ScaleByAdamState)


def test_a_call_that_only_gathers_gradients_pulls_nothing_back() -> None:
    """Nor does it move on the schedule of the pull."""
    memory, params = remembered(), jax.tree.map(lambda value: value + 0.3, new_weights())
    gathering = optax.MultiSteps(optax.sgd(0.125), 2).gradient_transformation()
    optimizer = projected(memory, lambda count: 0.125 / (count + 1), gathering)
    gradients = jax.tree.map(np.ones_like, params)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for number in range(4):
        updates, state = update(gradients, state, params)
        if number % 2 == 0:
            assert all(not np.any(step) for step in jax.tree.leaves(updates))
            continue
        mean, strength = memory.penalised["first.bias"]
        pull, bias = 0.125 / (number // 2 + 1) * np.asarray(strength), np.asarray(params["first"]["bias"])
        expected = (-0.125 + pull * (mean - bias)) / (1 + pull)
        np.testing.assert_allclose(updates["first"]["bias"], expected, rtol=1e-10)


def test_a_step_that_is_left_out_as_it_is_not_finite_pulls_nothing_back() -> None:
    memory, params = remembered(), jax.tree.map(lambda value: value + 0.3, new_weights())
    optimizer = projected(memory, 0.125, optax.apply_if_finite(optax.sgd(0.125), 3))
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    updates, state = update(jax.tree.map(lambda value: value * np.nan, params), state, params)
    assert int(state.count) == 0
    assert all(not np.any(step) for step in jax.tree.leaves(updates))
    updates, state = update(jax.tree.map(np.ones_like, params), state, params)
    assert int(state.count) == 1
    assert all(np.any(step) for step in jax.tree.leaves(updates))


def test_what_an_optimizer_needs_beside_gradients_is_passed_on() -> None:
    def update(updates: Any, state: Any, _: Any = None, *, value: float) -> Any:
        return jax.tree.map(lambda step: value * step, updates), state

    memory, params = replace(remembered(), uncovered="free"), new_weights()
    scaling = optax.GradientTransformationExtraArgs(lambda _: (), update)
    transformation = projected(memory, 0.1, scaling)
    updates, _ = transformation.update(params, transformation.init(params), params, value=3.0)
    np.testing.assert_allclose(updates["first"]["bias"], 3 * params["first"]["bias"])


def test_an_adam_that_has_taken_no_step_pulls_nothing_out_of_range() -> None:
    """A wrapper that accumulates gradients lets its first call take none."""
    params, memory = new_weights(), remember(perceptron, new_weights(), new_data(1), check=False)
    inner = optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation()
    transformation = projected(memory, 0.01, inner)
    state = transformation.init(params)
    for _ in range(3):
        updates, state = transformation.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))


@pytest.mark.filterwarnings("ignore:second moments of an optimizer stand for:UserWarning")
def test_an_amsgrad_pulls_as_an_adam_does_and_has_its_second_moments() -> None:
    """In the first step both divide by the same."""
    params, memory = new_weights(4), remember(perceptron, new_weights(), new_data(1), check=False)
    stepped, squares = [], []
    for optimizer in (optax.adam(0.01), optax.amsgrad(0.01)):
        transformation = projected(memory, 0.01, optimizer)
        gradients = jax.tree.map(jnp.cos, params)
        updates, state = transformation.update(gradients, transformation.init(params), params)
        stepped.append(updates["first"]["bias"])
        found = remember(perceptron, params, state=state, samples=4, check=False)
        squares.append(found.posterior.precision.diagonal()["first.bias"])
    np.testing.assert_allclose(stepped[1], stepped[0], rtol=1e-12)
    np.testing.assert_allclose(squares[1], squares[0], rtol=1e-12)
