"""Merges of models in JAX against brute force in float64, by likelihoods and losses of all kinds."""

import math
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from adapters.jax.data_loss import DataLoss, JaxLoss
from adapters.jax.memory import remember
from adapters.jax.own_loop import merge, projected
from became_core import BecameError, Secant, optimal_alpha
from became_core.arrays import named_leaves
from became_core.curvature import Bernoulli, Categorical, Gaussian
from became_core.laplace import NativeExpansion
from tests.augmented import Augmented
from tests.jax.own_loop import (
    CLASSES,
    Batches,
    cross_entropy,
    new_data,
    new_weights,
    perceptron,
    remembered,
    sample_gradients,
    train,
)


def _alpha_by_brute_force(apply: Any, memory: Any, theta_gp: Any, theta_hat: Any, new: Batches) -> float:
    """The secant's alpha from dense differences: slopes at both ends, the old side scaled by exact over diagonal."""
    inputs, targets = (np.concatenate(side) for side in zip(*new, strict=True))

    @jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
    def at(alpha: Any) -> Any:
        theta = jax.tree.map(lambda a, b: a + alpha * (b - a), theta_gp, theta_hat)
        return apply(theta, inputs), jax.grad(lambda theta: cross_entropy(apply(theta, inputs), targets))(theta)

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
    squares = sample_gradients(cross_entropy, apply, theta_hat, new)
    kappa = exact / sum(float(((squares[n] ** 2).mean(0) * d[n] ** 2).sum()) for n in d)
    known = memory.posterior.precision.diagonal(), memory.posterior.mean
    old, mean = ({n: np.asarray(value) for n, value in part.items()} for part in known)
    b = start + kappa * sum(float(((gp[n] - mean[n]) * old[n] * d[n]).sum()) for n in d)
    c = end - start + kappa * sum(float((old[n] * d[n] ** 2).sum()) for n in d)
    return min(max(-b / c, 0.0), 1.0)


def _two_models() -> tuple[Any, Any, Any]:
    """Return the memory of old data, and the stable and the plastic weights of a perceptron."""
    old, new = new_data(1), new_data(2)
    params = train(perceptron, new_weights(), old, optax.adam(0.02), 10)
    memory = remember(perceptron, params, old, check=False)
    theta_gp = train(perceptron, params, new, optax.chain(optax.adam(0.02), projected(memory, 0.02)))
    return memory, theta_gp, train(perceptron, theta_gp, new, optax.adam(0.02), 20)


def test_the_merge_is_the_minimum_that_brute_force_finds() -> None:
    apply, new = perceptron, new_data(2)
    memory, theta_gp, theta_hat = _two_models()
    report = merge(apply, memory, theta_gp, theta_hat, iter(new), estimator=Secant(), trace=3)
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
    loss_at = jax.jit(lambda alpha: cross_entropy(apply(between(alpha), inputs), targets))

    def between(alpha: Any) -> Any:
        return jax.tree.map(lambda a, b: a + alpha * (b - a), theta_gp, theta_hat)

    for alpha, loss in report.trace:
        assert loss == pytest.approx(float(loss_at(alpha)))


def test_it_merges_by_the_papers_form_unless_told_otherwise() -> None:
    apply, new = perceptron, new_data(2)
    memory, theta_gp, theta_hat = _two_models()
    squares = sample_gradients(cross_entropy, apply, theta_hat, new)
    fisher = {name: (gradients**2).mean(0) for name, gradients in squares.items()}
    precision = memory.posterior.precision.diagonal()
    gp, hat, old = (jax.tree.map(np.asarray, named_leaves(tree)) for tree in (theta_gp, theta_hat, precision))
    expected = float(optimal_alpha(gp, hat, old, fisher))
    assert 0 < expected < 1
    report = merge(apply, memory, theta_gp, theta_hat, new)
    assert report.alpha == pytest.approx(expected, rel=1e-9)
    assert report.curvature == "the diagonal Fisher information"


@jax.custom_vjp  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _squashed(x: Any) -> Any:
    return jnp.tanh(x)


_squashed.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


def test_a_derivative_is_taken_by_the_first_way_that_there_is() -> None:
    """A function with a backward pass of its own has no forward mode; a difference needs outputs alone."""

    def reverse_only(params: Any, inputs: Any) -> Any:
        hidden = _squashed(inputs @ params["first"]["kernel"] + params["first"]["bias"])
        return hidden @ params["last"]["weight"].T + params["last"]["bias"]

    direction, batches, found = named_leaves(new_weights(9)), new_data(1), []
    for apply, way in (
        (perceptron, "forward mode"),
        (reverse_only, "two reverse passes"),
        (perceptron, "difference"),
    ):
        data = DataLoss(apply, new_weights(), Categorical(), fisher="empirical", checks=False, shows=False)
        if way == "difference":
            data.derivatives.way = "difference"
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


def test_a_batch_that_fails_tells_nothing_of_the_derivatives_that_there_are() -> None:
    params, (inputs, targets) = new_weights(), new_data(1)[0]
    data = DataLoss(perceptron, params, Categorical(), fisher="empirical", checks=False, shows=False)
    with pytest.raises(TypeError):
        data.along([(inputs, targets), (inputs[:, :2], targets)], data.theta, [data.theta])
    assert data.along([(inputs, targets)], data.theta, [data.theta])[1] == "forward mode"


def test_a_loss_of_ones_own_is_merged_by_slopes() -> None:
    """The cross-entropy, given as a callable: its own second derivative, and not only the Gauss-Newton part."""
    params, far, (new,) = new_weights(3), new_weights(4), new_data(2, 1)
    memory = remember(perceptron, params, new_data(1), cross_entropy, check=False)
    for name, gradients in sample_gradients(cross_entropy, perceptron, params, new_data(1)).items():
        found = memory.posterior.precision.diagonal()[name]
        np.testing.assert_allclose(found, (gradients**2).mean(0), rtol=1e-10, atol=1e-14)
    report = merge(perceptron, memory, params, far, [new], estimator=NativeExpansion())
    assert report.curvature == "a difference of slopes"

    def along(alpha: Any) -> Any:
        return cross_entropy(perceptron(jax.tree.map(lambda a, b: a + alpha * (b - a), params, far), new[0]), new[1])

    slope, curvature = jax.jit(lambda a: (jax.grad(along)(a), jax.grad(jax.grad(along))(a)))(1.0)
    assert _expanded(report, memory, params, far) == pytest.approx((float(slope), float(curvature)), rel=1e-3)
    with pytest.raises(BecameError, match=r"the loss has shape \[4\]; it must return one number"):
        remember(perceptron, params, new_data(1), optax.softmax_cross_entropy_with_integer_labels, check=False)
    with pytest.raises(BecameError, match="a loss of your own has no targets of the model's own"):
        remember(perceptron, params, new_data(1), cross_entropy, fisher="true", check=False)


def test_slopes_that_are_subtracted_are_of_the_same_samples() -> None:
    """Slopes of two passes over a loader that augments at random differ by more than a small step tells."""
    loader = Augmented(new_data(2, 8))
    data = DataLoss(perceptron, new_weights(), cross_entropy, fisher="empirical", checks=False, shows=False)
    directions = [named_leaves(new_weights(seed)) for seed in (1, 2)]
    found, _ = data.along(loader, data.theta, directions)
    assert loader.passes == 1
    expected, _ = data.along(loader.given, data.theta, directions)
    np.testing.assert_allclose(found.slope, expected.slope, rtol=1e-12)
    np.testing.assert_allclose(found.curvature, expected.curvature, rtol=1e-12)


@pytest.mark.parametrize("likelihood", [Gaussian(), Bernoulli()])
def test_regression_and_several_labels_are_remembered_and_merged(likelihood: Any) -> None:
    params = new_weights()
    is_gaussian = isinstance(likelihood, Gaussian)
    batches = [(x, np.sin(x[:, :3]) if is_gaussian else (x[:, :3] > 0).astype(float)) for x, _ in new_data(1)]
    memory = remember(perceptron, params, batches, likelihood, check=False)
    residual = np.asarray(jax.jit(perceptron)(params, batches[0][0])) - batches[0][1]
    if is_gaussian:
        assert isinstance(memory.likelihood, Gaussian)
        assert memory.likelihood.noise == pytest.approx(np.sqrt(np.mean(residual**2)))

    def loss(z: Any, y: Any) -> Any:
        if is_gaussian:
            return ((z - y) ** 2).sum() / (2 * memory.likelihood.noise**2)  # type: ignore[union-attr]
        return optax.sigmoid_binary_cross_entropy(z, y).sum()

    for key, gradients in sample_gradients(loss, perceptron, params, batches).items():
        found = memory.posterior.precision.diagonal()[key]
        np.testing.assert_allclose(found, (gradients**2).mean(0), rtol=1e-9, atol=1e-14)
    far = new_weights(4)
    report = merge(perceptron, memory, params, far, batches, estimator=NativeExpansion())
    inputs, targets = (np.concatenate(side) for side in zip(*batches, strict=True))
    delta = jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), params, far)
    tangents = jax.jit(lambda: jax.jvp(lambda theta: perceptron(theta, inputs), (far,), (delta,)))()
    z, v = map(np.asarray, tangents)
    if is_gaussian:
        precision = memory.likelihood.noise**-2  # type: ignore[union-attr]
        residual, bend = (z - targets) * precision, precision
    else:
        p = 1 / (1 + np.exp(-z))
        residual, bend = p - targets, p * (1 - p)
    expected = float((residual * v).sum() / len(z)), float((bend * v**2).sum() / len(z))
    assert _expanded(report, memory, params, far) == pytest.approx(expected, rel=1e-9)


def test_the_noise_of_a_regression_is_fitted_where_a_loss_is_the_first_to_need_it() -> None:
    weights, data = new_weights(), [(x, x[:, :CLASSES]) for x, _ in new_data(1)]
    loss = DataLoss(perceptron, weights, Gaussian(), fisher="empirical", checks=False, shows=False)
    inputs, targets = data[0]
    noise = float(np.sqrt(np.mean((perceptron(weights, inputs) - targets) ** 2)))
    assert loss.mean(data[:1]) == pytest.approx(CLASSES / 2)  # of residuals whose mean square is the noise's
    assert isinstance(loss.loss, Gaussian)
    assert loss.loss.noise == pytest.approx(noise)


def test_what_is_not_finite_is_named_and_not_merged() -> None:
    params, batches, memory = new_weights(), new_data(2), remembered()
    plastic = jax.tree.map(lambda value: value + 0.1, params)
    broken = [batches[1], (batches[0][0] * math.nan, batches[0][1])]
    with pytest.raises(BecameError, match=r"the Fisher information of 'first\.bias' is not finite; look for NaN"):
        merge(perceptron, memory, params, plastic, broken, check=False)
    plastic["last"]["bias"] = plastic["last"]["bias"].at[0].set(math.inf)
    with pytest.raises(BecameError, match=r"'last\.bias' is not finite in the stable or in the plastic model"):
        merge(perceptron, memory, params, plastic, batches, check=False)


@pytest.mark.parametrize("trace", [1, -1])
def test_a_trace_without_both_ends_is_refused_before_a_batch_is_read(trace: int) -> None:
    params, batches, memory = new_weights(), iter(new_data(2)), remembered()
    plastic = jax.tree.map(lambda value: value + 0.1, params)
    with pytest.raises(BecameError, match=f"trace is {trace}; give at least 2 points, both ends among them, or 0"):
        merge(perceptron, memory, params, plastic, batches, trace=trace)
    assert len(list(batches)) == len(new_data(2))


def test_a_merge_of_a_model_with_itself_is_refused() -> None:
    """As nnx gives it, whose optimizer changes the variables that a split returned."""
    params = new_weights()
    memory = remember(perceptron, params, new_data(1), check=False)
    with pytest.raises(BecameError, match="are the same arrays, as those of nnx are"):
        merge(perceptron, memory, params, params, new_data(2))


def test_gradients_of_a_loss_of_ones_own_are_as_exact_in_float16_as_a_single_samples() -> None:
    outputs = jnp.asarray(np.linspace(1e-4, 2e-4, 512, dtype=np.float16)[:, None])
    gradient = JaxLoss(lambda z, y: jnp.mean((z - y) ** 2) / 2).gradient(outputs, 0 * outputs)
    np.testing.assert_array_equal(gradient, outputs)
