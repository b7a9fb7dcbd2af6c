"""Memories in JAX that are calibrated across tasks; that PyTorch's are alike is tested in ``tests/agreement``."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from adapters.jax.memory import load, remember, save
from adapters.jax.own_loop import merge, penalty
from became_core import BecameError, PaperClosedForm
from tests.jax.own_loop import new_data, new_weights, perceptron, remembered


def _moved(seed: int, scale: float = 0.1) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda value: value + scale * rng.normal(size=value.shape), new_weights())


def _no_batch(index: int) -> Any:
    raise AssertionError(f"batch {index} was asked for")


def test_the_movement_of_a_merge_comes_with_its_memory() -> None:
    """It is theta_hat - theta_gp, which ``begin`` can say as well; the memory before the merge does not know it."""
    theta_gp, theta_hat, new = _moved(1), _moved(2), new_data(2)
    settings: dict[str, Any] = {"calibration": "across", "check": False}
    memory = remember(perceptron, new_weights(), new_data(1), begin=_moved(3), **settings)
    merged = merge(perceptron, memory, theta_gp, theta_hat, new)
    assert merged.memory.across is not None
    assert merged.memory.across.following is not None
    for name, value in merged.memory.across.following.items():
        layer, part = name.split(".")
        np.testing.assert_allclose(value, theta_hat[layer][part] - theta_gp[layer][part])
    after = remember(perceptron, merged.params, new, memory=merged.memory, check=False)
    assert after.across is not None
    assert after.across.following is None
    assert after.across.kappa not in (None, 1.0)
    # More of the same task, at the same weights.
    again = remember(perceptron, merged.params, new, memory=after, check=False)
    assert again.across is not None
    assert again.across.kappa == after.across.kappa
    begin = jax.tree.map(lambda p, a, b: p - (b - a), merged.params, theta_gp, theta_hat)
    said = remember(perceptron, merged.params, new, memory=merged.memory, begin=begin, check=False)
    for name, value in said.posterior.precision.diagonal().items():
        np.testing.assert_allclose(value, after.posterior.precision.diagonal()[name], rtol=1e-9)
    assert float(jax.jit(penalty)(after, _moved(4))) > 0  # the memory is a tree for JAX


def test_a_merge_without_calibration_across_tasks_returns_the_memory_that_it_was_given() -> None:
    merged = merge(perceptron, remembered(), _moved(1), _moved(2), new_data(2))
    assert merged.memory.across is None
    assert merged.memory.posterior is remembered().posterior


def test_what_cannot_be_calibrated_is_refused_before_any_work(tmp_path: Path) -> None:
    across: dict[str, Any] = {"calibration": "across", "check": False}

    def refused(message: str, params: Any, **arguments: Any) -> None:
        with pytest.raises(BecameError, match=message):
            remember(perceptron, params, map(_no_batch, [0]), **arguments)

    params = new_weights()
    refused("none has moved; give begin=, the parameters before it", params, **across)
    refused("none has moved", params, begin=params, **across)
    refused("begin= is for calibration across tasks", params, begin=_moved(1))
    refused("the calibration is 'always'; choose merge or across", params, calibration="always")
    refused("the memory has calibration='merge'", params, memory=remembered(), calibration="across")
    memory = remember(perceptron, params, new_data(1), begin=_moved(3), **across)
    refused("the memory has calibration='across'", params, memory=memory, calibration="merge")
    refused("give the memory of the merge's result, or begin=", _moved(1), memory=memory)
    state = {"count": jnp.array(1)}
    with pytest.raises(BecameError, match="measures old batches; give them, and no second moments"):
        remember(perceptron, params, memory=memory, state=state, samples=4)
    with pytest.raises(BecameError, match="leave estimator= out"):
        merge(perceptron, memory, _moved(1), _moved(2), new_data(2), estimator=PaperClosedForm())
    save(memory, tmp_path / "memory.safetensors")
    loaded = load(params, tmp_path / "memory.safetensors")
    assert loaded.across is not None
    assert loaded.across.kappa is None
