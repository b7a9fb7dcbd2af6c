"""The functions around a user's own loop in JAX against brute force: memory, steps, merges, files; in float64.

JAX compiles every operation for every shape, which is most of what a test costs: so all networks have matrices of 6 x 8
and 8 x 3, all batches have four samples, and what several tests need is made once.
"""

import doctest
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax import numpy as jnp

from adapters.jax import memory as memories
from adapters.jax import own_loop
from adapters.jax.data_loss import DataLoss
from adapters.jax.memory import Memory, coverage, load, remember, save
from adapters.jax.own_loop import merge, penalty, projected
from became_core import BecameError
from became_core.arrays import named_leaves
from became_core.curvature import Bernoulli, Categorical, Gaussian
from became_core.laplace import NativeExpansion
from became_core.projection import GPM, NSCL, SGP, TRGP

WIDTH, HIDDEN, CLASSES = 6, 8, 3
Batches = list[tuple[Any, Any]]


@pytest.fixture(autouse=True)
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "taps do not know", UserWarning)
        yield


def _data(seed: int, batches: int = 2, size: int = 4) -> Batches:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, WIDTH)), rng.integers(0, CLASSES, size=size)) for _ in range(batches)]


def _perceptron(params: Any, inputs: Any) -> Any:
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["weight"].T + params["last"]["bias"]


def _weights(seed: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    kernel, bias, weight = (
        jnp.asarray(rng.normal(size=shape) / 3) for shape in ((WIDTH, HIDDEN), (HIDDEN,), (CLASSES, HIDDEN))
    )
    return {"first": {"kernel": kernel, "bias": bias}, "last": {"weight": weight, "bias": jnp.zeros(CLASSES)}}


@cache
def _memory() -> Memory:
    """What a perceptron remembers of the first data."""
    return remember(_perceptron, _weights(), _data(1), check=False)


def _convolution(params: Any, inputs: Any) -> Any:
    """A kernel [width, in, out], whose first two axes are the inputs', and a scale that no projector protects."""
    images = inputs.reshape(-1, 2, 3)
    hidden = lax.conv_general_dilated(images, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.tanh(hidden * params["scale"]).reshape(len(inputs), -1) @ params["kernel"]


def _kernels() -> Any:
    rng = np.random.default_rng(5)
    shapes = {"conv": (2, 3, 4), "scale": (4,), "kernel": (HIDDEN, CLASSES)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


NETWORKS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "perceptron": lambda: (_perceptron, _weights()),
    "convolution": lambda: (_convolution, _kernels()),
}


@jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _cross_entropy(outputs: Any, targets: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def _train(apply: Any, params: Any, batches: Batches, optimizer: Any, epochs: int = 3) -> Any:
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, inputs: Any, targets: Any) -> Any:
        gradients = jax.grad(lambda params: _cross_entropy(apply(params, inputs), targets))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(np.array, params)  # a copy, which may be given away
    state = jax.jit(optimizer.init)(params)
    for inputs, targets in batches * epochs:
        params, state = step(params, state, inputs, targets)
    return params


@cache
def _of_samples(loss: Any, apply: Any) -> Any:
    def of_sample(params: Any, x: Any, y: Any) -> Any:
        return loss(apply(params, x[None]), y[None])

    return jax.jit(jax.vmap(jax.grad(of_sample), (None, 0, 0)))


def _sample_gradients(loss: Any, apply: Any, params: Any, batches: Batches) -> Any:
    """The gradients of single samples' losses by parameter, [samples, ...]."""
    inputs, targets = (np.concatenate(side) for side in zip(*batches, strict=True))
    gradients = _of_samples(loss, apply)(params, inputs, targets)
    return {name: np.asarray(value) for name, value in named_leaves(gradients).items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_remembers_the_mean_of_squared_gradients_of_single_samples(name: str) -> None:
    apply, params = NETWORKS[name]()
    batches = _data(1)
    memory = remember(apply, params, iter(batches), check=name == "convolution")
    found = memory.posterior.precision.diagonal()
    expected = _sample_gradients(_cross_entropy, apply, params, batches)
    assert set(found) == set(expected) == set(memory.posterior.mean)
    for key, gradients in expected.items():
        np.testing.assert_allclose(found[key], (gradients**2).mean(0), rtol=1e-9, atol=1e-14, err_msg=key)
    if name == "convolution":
        assert memory.checked is not None
        assert memory.checked.findings[-2].what == "outputs if matrices move where the sample reads nothing"
    table = coverage(memory)
    assert [p.name for p in table.parameters] == list(named_leaves(params))
    protected = {p.name for p in table.parameters if p.treatment == "protected"}
    assert protected == {key for key in expected if key.endswith(("kernel", "last.weight", "conv"))}
    assert table.share("protected") + table.share("penalised") == pytest.approx(1)
    use = {p.name: p.use for p in table.parameters}
    if name == "perceptron":
        assert (use["first.kernel"], use["last.weight"]) == ("matrix, transposed", "matrix")


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "AdamW": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05)),
}


@pytest.mark.parametrize(("name", "optimizer"), [("perceptron", "SGD"), ("convolution", "AdamW")])
def test_old_outputs_stand_still_in_steps_that_are_projected(name: str, optimizer: str) -> None:
    """All directions of the old data are protected, and what cannot be protected is frozen; steps are compiled."""
    apply, params = NETWORKS[name]()
    old, new, outputs = _data(1, 1, 2), _data(2), jax.jit(apply)
    memory = remember(apply, params, old, projector=GPM(1.0), uncovered="frozen", check=False)
    before = outputs(params, old[0][0])
    moved = _train(apply, params, new, optax.chain(OPTIMIZERS[optimizer](), projected(memory, 0.05)))
    np.testing.assert_allclose(outputs(moved, old[0][0]), before, rtol=0, atol=1e-9)
    first = named_leaves(params)
    changed = {key for key, value in named_leaves(moved).items() if not np.array_equal(value, first[key])}
    assert changed
    assert changed <= {p.name for p in coverage(memory).parameters if p.treatment == "protected"}
    free = _train(apply, params, new, OPTIMIZERS[optimizer]())
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
    model, old, (new, *_) = _Perceptron(), _data(1, 1, 2), _data(2)
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
        optimizer.update(model, nnx.grad(lambda model: _cross_entropy(model(inputs), targets))(model))

    for _ in range(2):
        step(model, optimizer, *new)
    np.testing.assert_allclose(outputs(nnx.state(model), old[0][0]), before, rtol=0, atol=1e-9)
    assert np.abs(np.asarray(model.first.kernel[...]) - kernel).max() > 0.01
    with pytest.warns(UserWarning, match="unfit after clipping"):
        of_moments = remember(apply, nnx.state(model), state=optimizer.opt_state, samples=4)
    second = optimizer.opt_state.inner[0].nu["first"]["bias"][...]
    found = of_moments.posterior.precision.diagonal()["first.bias"]
    np.testing.assert_allclose(found, np.asarray(second) * 4 / (1 - 0.999**2), rtol=1e-6)


def test_a_function_in_half_precision_is_measured_to_its_rounding() -> None:
    params = _weights()
    half = jax.tree.map(lambda value: np.asarray(value, jnp.bfloat16), params)
    memory = remember(lambda params, inputs: _perceptron(params, inputs.astype(jnp.bfloat16)), half, _data(1))
    expected = (_sample_gradients(_cross_entropy, _perceptron, params, _data(1))["last.weight"] ** 2).mean(0)
    found = memory.posterior.precision.diagonal()["last.weight"]
    np.testing.assert_allclose(found, expected, rtol=0.2, atol=0.02 * expected.max())


@pytest.mark.parametrize("projector", [SGP(0.9), NSCL(), GPM(0.7)])
def test_a_step_is_the_projectors_own_of_the_matrix_as_it_is_multiplied(projector: Any) -> None:
    params = _weights()
    memory = remember(_perceptron, params, _data(1), projector=projector, check=False)
    transformation = projected(memory, 0.1)
    updates = jax.tree.map(lambda value: jnp.asarray(np.cos(value) / 7), params)
    (found, state) = jax.jit(transformation.update)(updates, transformation.init(params), params)
    kernel, weight = updates["first"]["kernel"], updates["last"]["weight"]
    expected = memory.projector.project({"first.kernel": kernel.T, "last.weight": weight})
    np.testing.assert_allclose(found["first"]["kernel"], expected["first.kernel"].T, rtol=1e-12)
    np.testing.assert_allclose(found["last"]["weight"], expected["last.weight"], rtol=1e-12)
    assert int(state.count) == 1


def test_what_is_not_covered_takes_a_proximal_step_to_the_old_mean() -> None:
    params, away = (jax.tree.map(np.asarray, _weights(seed)) for seed in (3, 4))
    memory = remember(_perceptron, params, _data(1), penalty=30.0, check=False)
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
    params, away = (jax.tree.map(np.asarray, _weights(seed)) for seed in (3, 4))
    memory = replace(_memory(), penalty=30.0)
    found = jax.jit(jax.grad(penalty, 1))(memory, away)  # the memory is a tree
    given_away = jax.tree.map(jnp.asarray, params)
    after = remember(_perceptron, given_away, _data(1), check=False)
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
    params, memory = _weights(), _memory()
    transformation = projected(memory, 0.1)
    state = transformation.init(params)
    jaxpr = jax.make_jaxpr(transformation.update)(params, state, params)
    assert max((np.size(const) for const in jaxpr.consts), default=0) <= 1
    assert any(np.shape(leaf) == (WIDTH, memory.projector.rank["first.kernel"][0]) for leaf in jax.tree.leaves(state))


def test_steps_keep_the_dtype_of_the_parameters() -> None:
    params = jax.tree.map(lambda value: np.asarray(value, jnp.bfloat16), _weights())
    transformation = projected(_memory(), 0.1)
    updates, _ = jax.jit(transformation.update)(params, transformation.init(params), params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(updates)} == {"bfloat16"}


def _alpha_by_brute_force(apply: Any, memory: Any, theta_gp: Any, theta_hat: Any, new: Batches) -> float:
    """The secant's alpha from dense differences: slopes at both ends, the old side scaled by exact over diagonal."""
    inputs, targets = (np.concatenate(side) for side in zip(*new, strict=True))

    @jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
    def at(alpha: Any) -> Any:
        theta = jax.tree.map(lambda a, b: a + alpha * (b - a), theta_gp, theta_hat)
        return apply(theta, inputs), jax.grad(lambda theta: _cross_entropy(apply(theta, inputs), targets))(theta)

    gp, hat = ({n: np.asarray(value) for n, value in named_leaves(tree).items()} for tree in (theta_gp, theta_hat))
    d = {n: value - gp[n] for n, value in hat.items()}
    start, end = (
        sum(float((np.asarray(value) * d[n]).sum()) for n, value in named_leaves(at(alpha)[1]).items())
        for alpha in (0.0, 1.0)
    )
    along = (np.asarray(at(1 + 1e-5)[0]) - np.asarray(at(1 - 1e-5)[0])) / 2e-5
    p = np.exp(at(1.0)[0])
    p /= p.sum(1, keepdims=True)
    exact = float(((p * along**2).sum(1) - (p * along).sum(1) ** 2).mean())
    squares = _sample_gradients(_cross_entropy, apply, theta_hat, new)
    kappa = exact / sum(float(((squares[n] ** 2).mean(0) * d[n] ** 2).sum()) for n in d)
    known = memory.posterior.precision.diagonal(), memory.posterior.mean
    old, mean = ({n: np.asarray(value) for n, value in part.items()} for part in known)
    b = start + kappa * sum(float(((gp[n] - mean[n]) * old[n] * d[n]).sum()) for n in d)
    c = end - start + kappa * sum(float((old[n] * d[n] ** 2).sum()) for n in d)
    return min(max(-b / c, 0.0), 1.0)


def test_the_merge_is_the_minimum_that_brute_force_finds() -> None:
    apply, old, new = _perceptron, _data(1), _data(2)
    params = _train(apply, _weights(), old, optax.adam(0.02), 10)
    memory = remember(apply, params, old, check=False)
    theta_gp = _train(apply, params, new, optax.chain(optax.adam(0.02), projected(memory, 0.02)))
    theta_hat = _train(apply, theta_gp, new, optax.adam(0.02), 20)
    report = merge(apply, memory, theta_gp, theta_hat, iter(new), trace=3)
    expected = _alpha_by_brute_force(apply, memory, theta_gp, theta_hat, new)
    assert report.alpha == pytest.approx(expected, rel=1e-4)
    assert 0 < report.alpha < 1
    assert report.promised
    assert report.is_convex
    assert report.slopes[0] < 0 < report.slopes[1]
    assert report.gain > 0
    assert report.curvature == "forward mode"
    assert f"α* = {report.alpha:.3f}" in str(report)
    assert jax.tree.structure(report.params) == jax.tree.structure(theta_hat)
    for found, gp, hat in zip(*map(jax.tree.leaves, (report.params, theta_gp, theta_hat)), strict=True):
        a, b = np.asarray(gp), np.asarray(hat)
        np.testing.assert_allclose(found, a + report.alpha * (b - a), rtol=1e-12, atol=1e-14)
    inputs, targets = (np.concatenate(side) for side in zip(*new, strict=True))
    loss_at = jax.jit(lambda alpha: _cross_entropy(apply(between(alpha), inputs), targets))

    def between(alpha: Any) -> Any:
        return jax.tree.map(lambda a, b: a + alpha * (b - a), theta_gp, theta_hat)

    for alpha, loss in report.trace:
        assert loss == pytest.approx(float(loss_at(alpha)))


@jax.custom_vjp  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _squashed(x: Any) -> Any:
    return jnp.tanh(x)


_squashed.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


def test_a_derivative_is_taken_by_the_first_way_that_there_is() -> None:
    """A function with a backward pass of its own has no forward mode; a difference needs outputs alone."""

    def reverse_only(params: Any, inputs: Any) -> Any:
        hidden = _squashed(inputs @ params["first"]["kernel"] + params["first"]["bias"])
        return hidden @ params["last"]["weight"].T + params["last"]["bias"]

    direction, batches, found = named_leaves(_weights(9)), _data(1), []
    for apply, way in (
        (_perceptron, "forward mode"),
        (reverse_only, "two reverse passes"),
        (_perceptron, "difference"),
    ):
        data = DataLoss(apply, _weights(), Categorical(), fisher="empirical", checks=False, shows=False)
        data.way = "difference" if way == "difference" else data.way
        quadratic, used = data.along(batches, data.theta, [direction])
        assert used == way
        found.append([float(quadratic.slope[0]), float(quadratic.curvature[0, 0])])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)


def _expanded(report: Any, memory: Any, theta_gp: Any, theta_hat: Any) -> tuple[float, float]:
    """The new loss's slope and curvature along the way at its end, from a report of all losses' own expansions."""
    precision, gp = memory.posterior.precision.diagonal(), named_leaves(theta_gp)
    old = sum(
        float((np.asarray(precision[n]) * (np.asarray(value) - np.asarray(gp[n])) ** 2).sum())
        for n, value in named_leaves(theta_hat).items()
    )
    return report.slopes[1] - old, report.slopes[1] - report.slopes[0] - old


def test_a_loss_of_ones_own_is_merged_by_slopes() -> None:
    """The cross-entropy, given as a callable: its own second derivative, and not only the Gauss-Newton part."""
    params, far, (new,) = _weights(3), _weights(4), _data(2, 1)
    memory = remember(_perceptron, params, _data(1), _cross_entropy, check=False)
    for name, gradients in _sample_gradients(_cross_entropy, _perceptron, params, _data(1)).items():
        found = memory.posterior.precision.diagonal()[name]
        np.testing.assert_allclose(found, (gradients**2).mean(0), rtol=1e-10, atol=1e-14)
    report = merge(_perceptron, memory, params, far, [new], estimator=NativeExpansion())
    assert report.curvature == "a difference of slopes"

    def along(alpha: Any) -> Any:
        return _cross_entropy(_perceptron(jax.tree.map(lambda a, b: a + alpha * (b - a), params, far), new[0]), new[1])

    slope, curvature = jax.jit(lambda a: (jax.grad(along)(a), jax.grad(jax.grad(along))(a)))(1.0)
    assert _expanded(report, memory, params, far) == pytest.approx((float(slope), float(curvature)), rel=1e-3)
    with pytest.raises(BecameError, match=r"the loss has shape \[4\]; it must return one number"):
        remember(_perceptron, params, _data(1), optax.softmax_cross_entropy_with_integer_labels, check=False)
    with pytest.raises(BecameError, match="a loss of your own has no targets of the model's own"):
        remember(_perceptron, params, _data(1), _cross_entropy, fisher="true", check=False)


@pytest.mark.parametrize("likelihood", [Gaussian(), Bernoulli()])
def test_regression_and_several_labels_are_remembered_and_merged(likelihood: Any) -> None:
    params = _weights()
    is_gaussian = isinstance(likelihood, Gaussian)
    batches = [(x, np.sin(x[:, :3]) if is_gaussian else (x[:, :3] > 0).astype(float)) for x, _ in _data(1)]
    memory = remember(_perceptron, params, batches, likelihood, check=False)
    residual = np.asarray(jax.jit(_perceptron)(params, batches[0][0])) - batches[0][1]
    if is_gaussian:
        assert isinstance(memory.likelihood, Gaussian)
        assert memory.likelihood.noise == pytest.approx(np.sqrt(np.mean(residual**2)))

    def loss(z: Any, y: Any) -> Any:
        if is_gaussian:
            return ((z - y) ** 2).sum() / (2 * memory.likelihood.noise**2)  # type: ignore[union-attr]
        return optax.sigmoid_binary_cross_entropy(z, y).sum()

    for key, gradients in _sample_gradients(loss, _perceptron, params, batches).items():
        found = memory.posterior.precision.diagonal()[key]
        np.testing.assert_allclose(found, (gradients**2).mean(0), rtol=1e-9, atol=1e-14)
    far = _weights(4)
    report = merge(_perceptron, memory, params, far, batches, estimator=NativeExpansion())
    inputs, targets = (np.concatenate(side) for side in zip(*batches, strict=True))
    delta = jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), params, far)
    tangents = jax.jit(lambda: jax.jvp(lambda theta: _perceptron(theta, inputs), (far,), (delta,)))()
    z, v = map(np.asarray, tangents)
    if is_gaussian:
        precision = memory.likelihood.noise**-2  # type: ignore[union-attr]
        residual, bend = (z - targets) * precision, precision
    else:
        p = 1 / (1 + np.exp(-z))
        residual, bend = p - targets, p * (1 - p)
    expected = float((residual * v).sum() / len(z)), float((bend * v**2).sum() / len(z))
    assert _expanded(report, memory, params, far) == pytest.approx(expected, rel=1e-9)


def test_sequences_of_several_lengths_are_remembered_by_the_token() -> None:
    """A mapping with labels, as transformers has it; one length is compiled after another."""
    rng = np.random.default_rng(0)
    shapes = {"table": (WIDTH, HIDDEN), "out": (HIDDEN, CLASSES)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def apply(params: Any, batch: Any) -> Any:
        hidden = params["table"][batch["ids"]] * batch["mask"][..., None]
        return jnp.tanh(jnp.cumsum(hidden, 1)) @ params["out"]

    batches = []
    for length in (4, 3):
        ids = rng.integers(0, WIDTH, size=(4, length))
        labels = np.where(rng.random(ids.shape) < 0.2, -100, ids % CLASSES)
        batches.append({"ids": ids, "mask": np.ones(ids.shape), "labels": labels})
    memory = remember(apply, params, batches, Categorical(by="token", shift=True), check=False)

    def loss(params: Any, ids: Any, mask: Any, labels: Any) -> Any:
        logits = apply(params, {"ids": ids[None], "mask": mask[None]})[0, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels[1:], 0))
        return jnp.where(labels[1:] >= 0, each, 0).sum()

    gradients_of = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0)))
    rows = [gradients_of(params, *(batch[key] for key in ("ids", "mask", "labels"))) for batch in batches]
    count = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    for key in params:
        expected = sum((np.asarray(row[key]) ** 2).sum(0) for row in rows) / count
        np.testing.assert_allclose(memory.posterior.precision.diagonal()[key], expected, rtol=1e-9, atol=1e-14)
    assert {p.name: p.treatment for p in coverage(memory).parameters} == {"table": "protected", "out": "protected"}
    slope = sum(float((np.asarray(row[key]).sum(0) * np.asarray(params[key])).sum()) for row in rows for key in params)
    for squares in ("sample", "token"):  # the gradient of a batch does not depend on what is squared
        known = Categorical(by="token", shift=True, squares=squares)
        data = DataLoss(apply, params, known, fisher="empirical", checks=False, shows=False)
        assert data.slope(batches, params, [params]) == pytest.approx([slope / count])


def test_a_second_task_adds_to_the_memory_and_may_have_a_head_of_its_own() -> None:
    rng = np.random.default_rng(0)
    shapes = {"kernel": (WIDTH, HIDDEN), "head1": (HIDDEN, CLASSES), "head2": (HIDDEN, CLASSES)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def apply(task: int, params: Any, inputs: Any) -> Any:
        return jnp.tanh(inputs @ params["kernel"]) @ params[f"head{task}"]

    first = remember(partial(apply, 1), params, _data(1), decay=0.5, penalty=7.0, check=False)
    assert {p.name: p.treatment for p in coverage(first).parameters}["head2"] == "penalised"
    moved = jax.tree.map(lambda value: np.asarray(value) + 0.1, params)
    second = remember(partial(apply, 2), moved, _data(2), memory=first, check=False)
    alone = remember(partial(apply, 2), moved, _data(2), check=False)
    before = first.posterior.precision.diagonal()
    for name, value in alone.posterior.precision.diagonal().items():
        expected = np.asarray(value) + 0.5 * np.asarray(before[name])
        np.testing.assert_allclose(second.posterior.precision.diagonal()[name], expected, rtol=1e-12)
    assert (second.penalty, second.decay) == (7.0, 0.5)
    assert second.projector.rank["kernel"][0] > first.projector.rank["kernel"][0]
    assert {p.name for p in coverage(second).parameters if p.treatment == "protected"} == set(params)
    np.testing.assert_allclose(second.posterior.mean["head1"], moved["head1"])
    assert remember(partial(apply, 2), moved, _data(2), memory=first, penalty=3.0, check=False).penalty == 3.0
    with pytest.raises(BecameError, match="the memory has a projector of its own"):
        remember(partial(apply, 2), moved, _data(2), memory=first, projector=SGP(), check=False)
    with pytest.raises(BecameError, match=r"of another architecture: the memory has no 'head3'"):
        remember(partial(apply, 2), moved | {"head3": jnp.ones(2)}, _data(2), memory=first, check=False)


def test_a_memory_comes_back_from_a_file(tmp_path: Path) -> None:
    params, file = _weights(), tmp_path / "memory.safetensors"
    likelihood = Categorical(weights=(1.0, 2.0, 3.0))
    memory = remember(
        _perceptron, params, _data(1), likelihood, projector=SGP(0.9), penalty=7.0, uncovered="free", check=False
    )
    save(memory, file)
    again = load(params, file)
    assert again.likelihood == memory.likelihood
    assert again.parameters == memory.parameters
    assert (again.penalty, again.uncovered, again.decay, again.fisher) == (7.0, "free", 1.0, "empirical")
    assert str(coverage(again)) == str(coverage(memory))
    for one, other in zip(*map(jax.tree.leaves, (memory, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(again) == jax.tree.structure(memory)
    other = load(params, file, "bernoulli", projector=SGP(0.5), uncovered="frozen", penalty=2.0)
    assert (other.uncovered, other.penalty, other.decay) == ("frozen", 2.0, 1.0)
    assert (other.likelihood, type(other.projector)) == (Bernoulli(), SGP)
    assert other.projector.rank == memory.projector.rank
    with pytest.raises(BecameError, match=r"the memory of another architecture: the memory has no 'w'"):
        load({"w": jnp.ones(3)}, file)
    wider = params | {"last": {"weight": jnp.ones((4, 8)), "bias": jnp.ones(4)}}
    with pytest.raises(BecameError, match=r"'last\.weight' is \[4, 8\] in the model and \[3, 8\] in the memory"):
        load(wider, file)
    with pytest.raises(BecameError, match="uncovered is 'thawed'"):
        load(params, file, uncovered="thawed")  # type: ignore[arg-type]
    file.write_bytes(b"no safetensors")
    with pytest.raises(TypeError, match="pennalty"):
        load(params, file, pennalty=2.0)  # type: ignore[call-arg]
    with pytest.raises(BecameError, match="is no memory that"):
        load(params, file)
    save(remember(_perceptron, params, _data(1), _cross_entropy, check=False), file)
    with pytest.raises(BecameError, match="made with a loss of your own; give it as likelihood="):
        load(params, file)
    assert load(params, file, likelihood=_cross_entropy).likelihood is _cross_entropy


def test_the_first_look_accepts_a_network_with_more_kinks_than_a_difference_can_avoid() -> None:
    rng = np.random.default_rng(0)
    params = {f"layer{index}": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) * 0.6) for index in range(12)}

    def apply(params: Any, inputs: Any) -> Any:
        for weight in params.values():
            inputs = jnp.maximum(inputs @ weight, 0.0) - 0.3
        return inputs

    memory = remember(apply, params, [(rng.normal(size=(4, WIDTH)), np.zeros(4, int))])
    assert memory.checked is not None
    assert memory.checked.findings[-1].difference < 1e-3


def test_the_first_look_finds_what_makes_measurements_meaningless() -> None:
    params, rng = _weights(), np.random.default_rng(0)

    def across(params: Any, inputs: Any) -> Any:
        outputs = _perceptron(params, inputs)
        return outputs + outputs.mean(0)

    def at_random(params: Any, inputs: Any) -> Any:
        outputs = _perceptron(params, inputs)
        return outputs * rng.normal(size=outputs.shape)

    shared = [({"x": x, "scale": np.arange(1.0, 4.0)}, y) for x, y in _data(1)]  # as long as the few samples are many
    remember(lambda params, inputs: _perceptron(params, inputs["x"]) * inputs["scale"], params, shared)
    with pytest.raises(BecameError, match="fails its first look: outputs of a sample alone"):
        remember(across, params, _data(1))
    with pytest.raises(BecameError, match=r"fails its first look: outputs of the user.s own pass, in evaluation"):
        remember(at_random, params, _data(1))
    assert remember(across, params, _data(1), check=False).checked is None


def test_a_call_that_only_gathers_gradients_pulls_nothing_back() -> None:
    """Nor does it move on the schedule of the pull."""
    memory, params = _memory(), jax.tree.map(lambda value: value + 0.3, _weights())
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
    memory, params = _memory(), jax.tree.map(lambda value: value + 0.3, _weights())
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

    memory, params = replace(_memory(), uncovered="free"), _weights()
    scaling = optax.GradientTransformationExtraArgs(lambda _: (), update)
    transformation = projected(memory, 0.1, scaling)
    updates, _ = transformation.update(params, transformation.init(params), params, value=3.0)
    np.testing.assert_allclose(updates["first"]["bias"], 3 * params["first"]["bias"])


def test_what_cannot_be_done_is_said_in_a_sentence() -> None:
    params, batches = _weights(), _data(1)
    go = partial(remember, _perceptron, params, check=False)
    memory = _memory()
    transformation = projected(memory, 0.1)
    with pytest.raises(BecameError, match="a schedule-free optimizer takes means of its steps"):
        projected(memory, 0.1, optax.contrib.schedule_free_sgd(0.1)).init(params)
    with pytest.raises(BecameError, match=r"projected needs the parameters; call optimizer\.update"):
        transformation.update(params, transformation.init(params))
    with pytest.raises(BecameError, match=r"another architecture: the memory has no 'w'"):
        transformation.init({"w": jnp.ones(3)})
    with pytest.raises(BecameError, match=r"another architecture: the memory has no 'w'"):
        transformation.update({"w": jnp.ones(3)}, transformation.init(params), {"w": jnp.ones(3)})
    with pytest.raises(BecameError, match=r"another architecture: the memory has no 'w'"):
        merge(_perceptron, memory, {"w": jnp.ones(3)}, params, batches)
    with pytest.raises(BecameError, match=r"another architecture: the model has no 'last\.weight'"):
        merge(_perceptron, memory, params, {"first": params["first"]}, batches)
    with pytest.raises(BecameError, match="there are no samples"):
        go([])
    with pytest.raises(BecameError, match="a batch has the keys x; it needs labels, or a generator"):
        go([{"x": batches[0][0]}])
    with pytest.raises(BecameError, match="a batch is a ndarray; give pairs"):
        go([batches[0][0]])
    with pytest.raises(BecameError, match="TRGP does more than to project steps"):
        go(batches, projector=TRGP())
    with pytest.raises(BecameError, match="there is no likelihood 'poisson'"):
        go(batches, "poisson")
    with pytest.raises(BecameError, match="the penalty is nan"):
        go(batches, penalty=math.nan)
    with pytest.raises(BecameError, match="there is nothing to learn"):
        remember(_perceptron, {"count": jnp.array(3)}, batches)
    with pytest.raises(BecameError, match="'w' is complex; let apply make it of two arrays"):
        remember(_perceptron, {"w": jnp.ones(3, complex)}, batches)
    with pytest.raises(BecameError, match="must return one array of outputs"):
        remember(lambda params, x: _perceptron(params, x).sum(), params, batches)
    with pytest.raises(BecameError, match="the parameters are one array without a name; put it in a dict"):
        save(remember(lambda w, x: x @ w, jnp.eye(WIDTH), batches, check=False), "nowhere")
    with pytest.raises(BecameError, match=r"another architecture: the model has no 'first\.kernel'"):
        optax.masked(transformation, jax.tree.map(lambda _: False, params)).init(params)
    turned = {"w": jnp.eye(WIDTH)}
    other = remember(lambda p, x: x @ p["w"], turned, [(x, y) for x, y in batches], check=False)
    with pytest.raises(BecameError, match="'w' was multiplied from its other side in the memory"):
        remember(lambda p, x: x @ p["w"].T, turned, batches, memory=other, check=False)


def test_what_is_not_finite_is_named_and_not_merged() -> None:
    params, batches, memory = _weights(), _data(2), _memory()
    plastic = jax.tree.map(lambda value: value + 0.1, params)
    broken = [batches[1], (batches[0][0] * math.nan, batches[0][1])]
    with pytest.raises(BecameError, match=r"the Fisher information of 'first\.bias' is not finite; look for NaN"):
        merge(_perceptron, memory, params, plastic, broken, check=False)
    plastic["last"]["bias"] = plastic["last"]["bias"].at[0].set(math.inf)
    with pytest.raises(BecameError, match=r"'last\.bias' is not finite in the stable or in the plastic model"):
        merge(_perceptron, memory, params, plastic, batches, check=False)


def test_data_that_use_a_protected_matrix_otherwise_are_refused() -> None:
    """No projection of steps stands for a use as anything else, so the matrix may not go on to be called protected."""
    params = {"w": jnp.eye(WIDTH)}
    whole = _data(1)[0]
    part = whole[0][:, None], whole[1]

    def apply(params: Any, x: Any) -> Any:
        return x @ params["w"] if x.ndim == 2 else x[:, 0] @ params["w"] + params["w"][:1] ** 2

    memory = remember(apply, params, [whole], check=False)
    message = "'w' is protected as a matrix that is multiplied as a whole, and these data use it in another way"
    with pytest.raises(BecameError, match=message):
        remember(apply, params, [part], memory=memory, check=False)
    with pytest.raises(BecameError, match=message):
        remember(apply, params, [whole, part], check=False)
    mixed = remember(apply, params, [part, whole], check=False)  # penalised
    assert (dict(mixed.matrices), dict(mixed.projector.rank)) == ({}, {})


def test_the_examples_of_the_docstrings_run() -> None:
    assert doctest.testmod(memories) == (0, 4)
    assert doctest.testmod(own_loop) == (0, 19)


def test_a_merge_of_a_model_with_itself_is_refused() -> None:
    """As nnx gives it, whose optimizer changes the variables that a split returned."""
    params = _weights()
    memory = remember(_perceptron, params, _data(1), check=False)
    with pytest.raises(BecameError, match="are the same arrays, as those of nnx are"):
        merge(_perceptron, memory, params, params, _data(2))


def test_an_adam_that_has_taken_no_step_pulls_nothing_out_of_range() -> None:
    """A wrapper that accumulates gradients lets its first call take none."""
    params, memory = _weights(), remember(_perceptron, _weights(), _data(1), check=False)
    inner = optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation()
    transformation = projected(memory, 0.01, inner)
    state = transformation.init(params)
    for _ in range(3):
        updates, state = transformation.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))
