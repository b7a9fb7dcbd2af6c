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
from tests.jax.own_loop import CLASSES, WIDTH, new_data


def _linear(params: Any, inputs: Any) -> Any:
    return inputs @ params["w"]


def _weights(seed: int) -> Any:
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=(WIDTH, CLASSES)))}


def _no_batch(index: int) -> Any:
    raise AssertionError(f"batch {index} was asked for")


def test_the_movement_of_a_merge_comes_with_its_memory() -> None:
    """It is theta_hat - theta_gp, which ``begin`` can say as well; the memory before the merge does not know it."""
    theta_gp, theta_hat, new = _weights(1), _weights(2), new_data(2)
    settings: dict[str, Any] = {"calibration": "across", "check": False}
    memory = remember(_linear, _weights(0), new_data(1), begin=_weights(3), **settings)
    merged = merge(_linear, memory, theta_gp, theta_hat, new)
    assert merged.memory.across is not None
    assert merged.memory.across.following is not None
    np.testing.assert_allclose(merged.memory.across.following["w"], theta_hat["w"] - theta_gp["w"])
    after = remember(_linear, merged.params, new, memory=merged.memory, check=False)
    assert after.across is not None
    assert after.across.following is None
    assert after.across.kappa not in (None, 1.0)
    # More of the same task, at the same weights.
    again = remember(_linear, merged.params, new, memory=after, check=False)
    assert again.across is not None
    assert again.across.kappa == after.across.kappa
    begin = jax.tree.map(lambda p, a, b: p - (b - a), merged.params, theta_gp, theta_hat)
    said = remember(_linear, merged.params, new, memory=merged.memory, begin=begin, check=False)
    expected = after.posterior.precision.diagonal()["w"]
    np.testing.assert_allclose(said.posterior.precision.diagonal()["w"], expected, rtol=1e-9)
    assert float(jax.jit(penalty)(after, _weights(4))) == 0  # the memory is a tree for JAX; all is protected


def test_a_merge_without_calibration_across_tasks_returns_the_memory_that_it_was_given() -> None:
    memory = remember(_linear, _weights(0), new_data(1), check=False)
    merged = merge(_linear, memory, _weights(1), _weights(2), new_data(2))
    assert merged.memory.across is None
    assert merged.memory.posterior is memory.posterior
    with pytest.raises(BecameError, match="the memory is not calibrated across tasks"):
        remember(_linear, merged.params, map(_no_batch, [0]), memory=merged.memory, calibration="across")


def test_what_cannot_be_calibrated_is_refused_before_any_work(tmp_path: Path) -> None:
    across: dict[str, Any] = {"calibration": "across", "check": False}

    def refused(message: str, params: Any, **arguments: Any) -> None:
        with pytest.raises(BecameError, match=message):
            remember(_linear, params, map(_no_batch, [0]), **arguments)

    params = _weights(0)
    refused("none has moved; give begin=, the parameters before it", params, **across)
    refused("none has moved", params, begin=params, **across)
    refused("begin= is for calibration across tasks", params, begin=_weights(1))
    refused("the calibration is 'always'; choose across, or leave it out", params, calibration="always")
    memory = remember(_linear, params, new_data(1), begin=_weights(3), **across)
    refused("give the memory of the merge's result, or begin=", _weights(1), memory=memory)
    state = {"count": jnp.array(1)}
    with pytest.raises(BecameError, match="measures old batches; give them, and no second moments"):
        remember(_linear, params, memory=memory, state=state, samples=4)
    with pytest.raises(BecameError, match="leave estimator= out"):
        merge(_linear, memory, _weights(1), _weights(2), new_data(2), estimator=PaperClosedForm())
    save(memory, tmp_path / "memory.safetensors")
    loaded = load(params, tmp_path / "memory.safetensors")
    assert loaded.across is not None
    assert loaded.across.kappa is None
