"""Parameters of modules of flax and equinox, drawn in NumPy and in double precision.

JAX would compile every operation of a module's own initialisation, which is most of what a small module costs.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

__all__ = ["drawn", "of_equinox", "of_linen", "of_nnx"]

Apply = Callable[[Any, Any], Any]


def drawn(*shape: int, seed: int = 0) -> Any:
    """Return normal numbers of this shape, with a deviation of a half; equal shapes have equal numbers."""
    return np.random.default_rng([*shape, seed]).normal(size=shape) / 2


def of_linen(module: Any, *inputs: Any) -> dict[str, Any]:
    """Return a module's variables; statistics are positive."""
    shapes: dict[str, Any] = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    variables = {kind: jax.tree.map(lambda leaf: drawn(*leaf.shape), tree) for kind, tree in shapes.items()}
    return {kind: tree if kind == "params" else jax.tree.map(np.abs, tree) for kind, tree in variables.items()}


def of_nnx(
    make: Callable[[], Any], wanted: Any = nnx.Param, run: Apply = lambda module, inputs: module(inputs)
) -> tuple[Apply, Any]:
    """Return a function of those of a module's variables that are wanted, and these; what else it has is fixed."""
    definition, params, rest = nnx.split(nnx.eval_shape(make), wanted, ...)

    def filled(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return abs(drawn(*leaf.shape)) if jnp.issubdtype(leaf.dtype, jnp.floating) else np.zeros(leaf.shape, leaf.dtype)

    rest = jax.tree.map(filled, rest)
    params = jax.tree.map(lambda leaf: drawn(*leaf.shape), params)
    return lambda params, inputs: run(nnx.merge(definition, params, rest), inputs), params


def of_equinox(make: Callable[[], Any], *state: Any) -> tuple[Apply, Any]:
    """Return a function of a module's arrays, as its users write it, and these; all else in it is fixed."""
    shapes, static = eqx.partition(eqx.filter_eval_shape(make), lambda leaf: hasattr(leaf, "shape"))
    params = jax.tree.map(lambda leaf: drawn(*leaf.shape), shapes)

    def apply(params: Any, inputs: Any) -> Any:
        outputs = jax.vmap(lambda x: eqx.combine(params, static)(x, *state))(inputs)
        return outputs[0] if state else outputs

    return apply, params
