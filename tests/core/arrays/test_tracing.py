"""alpha* and merge under each framework's tracer: one graph, the eager numbers, no look at values that are not there.

The weights are float32, so results under a compiler are compared to a few units in the last place.
"""

import importlib
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from became_core import BecameError, merge, optimal_alpha
from became_core.arrays import check_values
from tests.backends import to_numpy, to_xp

DRAW = np.random.default_rng(0)
# theta_gp, theta_hat, and two Fisher matrices, the first leaf and the second.
WEIGHTS, BIASES = DRAW.uniform(size=(4, 3, 2)).astype(np.float32), DRAW.uniform(size=(4, 2)).astype(np.float32)


def trees(xp: Any) -> list[Any]:
    """Four trees of every built-in container, the second of another order."""
    order = [("w", "b"), ("b", "w"), ("w", "b"), ("w", "b")]
    leaves = [{"w": to_xp(xp, w), "b": [to_xp(xp, b)]} for w, b in zip(WEIGHTS, BIASES, strict=True)]
    return [
        {"layer": OrderedDict((name, leaf[name]) for name in names)} for leaf, names in zip(leaves, order, strict=True)
    ]


def merged(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Everything at once: the alpha of four trees, and the merge at it."""
    alpha = optimal_alpha(a, b, c, d)
    return alpha, merge(a, b, alpha)


def assert_eager_numbers(found: Any) -> None:
    alpha, model = merged(*trees(importlib.import_module("array_api_compat.numpy")))
    np.testing.assert_allclose(to_numpy(found[0]), alpha, rtol=1e-6)
    for entry in ("w", "b"):
        ours, theirs = found[1]["layer"][entry], model["layer"][entry]
        pair = (ours[0], theirs[0]) if entry == "b" else (ours, theirs)
        np.testing.assert_allclose(to_numpy(pair[0]), pair[1], rtol=1e-6)


def framework(backend: str, wanted: str) -> Any:
    if backend != wanted:
        pytest.skip(f"traces with {wanted}, and the backend is {backend}")
    return importlib.import_module(wanted)


def test_torch_compile_makes_one_graph_without_a_warning(backend: str, xp: Any) -> None:
    torch = framework(backend, "torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.compile(merged, fullgraph=True, backend="eager")(*trees(xp))
    assert [str(warning.message) for warning in caught] == []
    assert_eager_numbers(found)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
def test_torch_compile_takes_every_precision(backend: str, xp: Any, name: str) -> None:
    torch = framework(backend, "torch")
    one = xp.ones(4, dtype=getattr(xp, name))
    torch.compiler.reset()
    found = torch.compile(optimal_alpha, fullgraph=True, backend="eager")(0 * one, 4 * one, 3 * one, one)
    assert (found.dtype, float(found)) == (torch.float64 if name == "float64" else torch.float32, 0.25)


def test_torch_func_maps_and_differentiates(backend: str, xp: Any) -> None:
    torch = framework(backend, "torch")
    a, b, c, d = (to_xp(xp, w) for w in WEIGHTS)
    rows = torch.func.vmap(optimal_alpha)(a, b, c, d)
    for row, *four in zip(rows, a, b, c, d, strict=True):
        assert float(row) == pytest.approx(float(optimal_alpha(*four)), rel=1e-6)
    variable = b.clone().requires_grad_()
    (expected,) = torch.autograd.grad(optimal_alpha(a, variable, c, d), variable)
    torch.testing.assert_close(torch.func.grad(optimal_alpha, argnums=1)(a, b, c, d), expected)


def test_jax_jit(backend: str, xp: Any) -> None:
    jax = framework(backend, "jax")
    assert_eager_numbers(jax.jit(merged)(*trees(xp)))


def test_jax_vmap(backend: str, xp: Any) -> None:
    jax = framework(backend, "jax")
    stacked = [{"w": to_xp(xp, w), "b": None} for w in WEIGHTS]  # axis 0 of each weight is mapped over
    rows = jax.vmap(optimal_alpha)(*stacked)
    for index in range(3):
        four = (to_xp(xp, w[index]) for w in WEIGHTS)
        assert float(rows[index]) == pytest.approx(float(optimal_alpha(*four)), rel=1e-6)


@pytest.mark.parametrize("jitted", [False, True])
def test_jax_grad(backend: str, xp: Any, jitted: bool) -> None:
    jax = framework(backend, "jax")
    a, b, c, d = ({"w": to_xp(xp, w.astype(np.float64))} for w in WEIGHTS)
    gradient = jax.grad(optimal_alpha, argnums=(0, 1, 2, 3))
    found = (jax.jit(gradient) if jitted else gradient)(a, b, c, d)
    step = 1e-6
    for argument in range(4):
        there, back = ([dict(tree) for tree in (a, b, c, d)] for _ in range(2))
        there[argument]["w"] = there[argument]["w"].at[0, 0].add(step)
        back[argument]["w"] = back[argument]["w"].at[0, 0].add(-step)
        expected = (float(optimal_alpha(*there)) - float(optimal_alpha(*back))) / (2 * step)
        assert float(found[argument]["w"][0, 0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_tensorflow_function(backend: str, xp: Any, jit_compile: bool) -> None:
    tf = framework(backend, "tensorflow")
    assert_eager_numbers(tf.function(merged, jit_compile=jit_compile)(*trees(xp)))


def test_tensorflow_variables_and_their_gradient(backend: str) -> None:
    tf = framework(backend, "tensorflow")
    a, b, c, d = (tf.Variable(w) for w in WEIGHTS)

    def gradient() -> Any:
        with tf.GradientTape() as tape:
            alpha = optimal_alpha(a, b, c, d)
        return alpha, tape.gradient(alpha, b)

    eager, compiled = gradient(), tf.function(gradient, jit_compile=True)()
    for ours, theirs in zip(compiled, eager, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert np.all(np.isfinite(eager[1]))
    assert np.any(np.asarray(eager[1]) != 0)


def test_a_condition_without_a_value_is_not_looked_at(backend: str, xp: Any) -> None:
    """What is false raises eagerly, and passes under every tracer of the framework."""

    def checked(x: Any) -> Any:
        check_values(xp.all(x > 0), "said")
        return x * 1.0

    negative = to_xp(xp, -np.ones(2))
    if backend != "dask":
        with pytest.raises(BecameError, match=r"^said$"):
            checked(negative)
    for trace in tracers(backend):
        assert to_numpy(trace(checked)(negative)).tolist() == [-1.0, -1.0]


def tracers(backend: str) -> list[Any]:
    """What turns a function of an array into its traced like, for a backend that has such things."""
    if backend == "torch":
        torch: Any = importlib.import_module("torch")
        return [lambda f: torch.compile(f, fullgraph=True, backend="eager"), torch.func.vmap]
    if backend == "jax":
        jax: Any = importlib.import_module("jax")
        return [jax.jit, jax.vmap]  # not jax.grad: there are values under it, and they may be looked at
    if backend == "tensorflow":
        tf: Any = importlib.import_module("tensorflow")
        return [tf.function, lambda f: tf.function(f, jit_compile=True)]
    return [lambda f: f] if backend == "dask" else []
