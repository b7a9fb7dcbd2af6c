"""The derivatives of a JAX function's outputs along directions in parameter space, J d, by the first way it allows.

| way | what it needs | error |
| --- | --- | --- |
| forward mode | ``jax.jvp`` | rounding |
| two reverse passes | ``jax.vjp`` alone (``jax.custom_vjp``): J d is the derivative of u . (J d) by u | rounding |
| difference | outputs alone: (z(theta + h d) - z(theta - h d)) / 2h | about h^2 |

Each way is tried in turn, and what works is remembered. The difference takes h = cbrt(epsilon) |theta| / |d|.

Convention: theta and directions have the same names.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax import numpy as jnp

from became_core.arrays import Array, Params

__all__ = ["Derivatives"]

Way = Literal["forward mode", "two reverse passes", "difference"]


class Derivatives:
    """Differentiates a function along directions.

    Attributes:
        way: the way that is used, or tried next.
    """

    def __init__(self, run: Callable[[Params, Any], Array], outputs: Callable[[Params, Any], Array]) -> None:
        """Keep the function of parameters and inputs, and the same compiled."""
        self.way: Way = "forward mode"
        self._run, self._outputs = run, outputs
        self._compiled: Callable[..., tuple[Array, Array]] = jax.jit(self._derived, static_argnames="way")

    def along(self, theta: Params, directions: Sequence[Params], inputs: Any) -> tuple[Array, Array]:
        """Return the outputs and their derivatives along directions, [directions, *outputs]."""
        before = self.way
        if before == "difference":
            return self.difference(theta, directions, inputs)
        try:
            return self._compiled(theta, list(directions), inputs, way=before)
        except Exception:
            self.way = "two reverse passes" if before == "forward mode" else "difference"
        try:
            return self.along(theta, directions, inputs)
        except BaseException:
            self.way = before  # an error of every way is one of the inputs, and tells nothing of the function
            raise

    def difference(
        self, theta: Params, directions: Sequence[Params], inputs: Any, shorter: float = 1.0
    ) -> tuple[Array, Array]:
        """Return the same by differences, whose step is multiplied by ``shorter``."""
        outputs, size, tangents = self._outputs(theta, inputs), float(_norm(theta)), []
        epsilon = max(float(jnp.finfo(value.dtype).eps) for value in (*theta.values(), outputs))
        for direction in directions:
            length = float(_norm(direction))
            step = shorter * epsilon ** (1 / 3) * (size or 1.0) / (length or 1.0)
            ahead, behind = (self._outputs(_moved(theta, direction, sign * step), inputs) for sign in (1, -1))
            tangents.append((ahead - behind) / (2 * step))
        return outputs, jnp.stack(tangents)

    def _derived(self, theta: Params, directions: list[Params], inputs: Any, way: Way) -> tuple[Array, Array]:
        def function(theta: Params) -> Array:
            return self._run(theta, inputs)

        if way == "forward mode":
            pairs = [jax.jvp(function, (theta,), (direction,)) for direction in directions]
            return pairs[0][0], jnp.stack([tangent for _, tangent in pairs])
        outputs, backward = jax.vjp(function, theta)

        def dot(seed: Array, direction: Params) -> Array:
            (gradient,) = backward(seed)
            return sum(jnp.vdot(gradient[name], value) for name, value in direction.items())

        zeros = jnp.zeros_like(outputs)
        return outputs, jnp.stack([jax.grad(dot)(zeros, direction) for direction in directions])


# Whole trees in one program: JAX would compile every operation for every shape.


@jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _moved(theta: Params, direction: Params, step: float) -> Params:
    return {name: value + (step * direction[name]).astype(value.dtype) for name, value in theta.items()}


@jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _norm(values: Params) -> Array:
    """Return the Euclidean norm of a tree, in at least float32."""
    wide = [value.astype(jnp.promote_types(value.dtype, jnp.float32)) for value in values.values()]
    return jnp.sqrt(sum(jnp.vdot(value, value).real for value in wide))
