"""The derivatives of a Keras model's logits along directions in parameter space, J d, for any model.

| way | what it needs | error |
| --- | --- | --- |
| forward mode | a forward-mode derivative of every operation (``tf.autodiff.ForwardAccumulator``) | rounding |
| two reverse passes | a derivative of every operation's derivative: J d is that of u . (J d) by u | rounding |
| difference | forward passes alone: (z(theta + h d) - z(theta - h d)) / 2h | about h^2 |

Each way is tried in turn, and what works is remembered. The difference takes h = cbrt(epsilon) |theta| / |d|.

Convention: directions go by parameters' names; a parameter without a direction stays.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import tensorflow as tf

from adapters.tensorflow.traced import Traced
from became_core import BecameError
from became_core.arrays import Array, Params

__all__ = ["Derivatives", "Differentiable", "Way"]

Way = Literal["forward mode", "two reverse passes", "difference"]
Batch = tuple[list[Array], Any]


class Differentiable(Protocol):
    """A function of weights and inputs that is differentiated along directions, such as a ``KerasFunction``."""

    def in_order(self, theta: Params) -> list[Array]:
        """Return the weights of a pass in their order."""

    def run(self, weights: Sequence[Array], inputs: Any) -> Array:
        """Return the logits, inside a trace or eagerly."""

    def outputs(self, theta: Params, inputs: Any) -> Array:
        """Return the logits at these weights."""


class Derivatives:
    """Differentiates a model along directions by the first way that it allows.

    Attributes:
        way: the way that is used, or tried next.
        shorter: what a difference's step is multiplied by.
    """

    def __init__(self, network: Differentiable, way: Way = "forward mode", shorter: float = 1.0) -> None:
        """Keep the model as a function, and the way to begin with."""
        self.way, self.shorter, self._network = way, shorter, network
        self.retrace()

    def retrace(self) -> None:
        """Trace the model anew from here on."""
        self._forward = Traced(self._forward_mode, needs_graph=True)
        self._reverse = Traced(self._two_reverse_passes, needs_graph=True)

    def along(self, theta: Params, directions: Sequence[Params], inputs: Any) -> tuple[Array, Array]:
        """Return the logits and their derivatives along directions, [directions, *logits]."""
        before = self.way
        if before == "difference":
            return self._difference(theta, directions, inputs)
        try:
            function = self._forward if before == "forward mode" else self._reverse
            weights = self._network.in_order(theta)
            pairs = [function([weights, self._network.in_order(direction)], inputs) for direction in directions]
            return pairs[0][0], tf.stack([tangent for _, tangent in pairs])
        except BecameError:
            raise
        except Exception:
            self.way = "two reverse passes" if before == "forward mode" else "difference"
        try:
            return self.along(theta, directions, inputs)
        except BaseException:
            self.way = before  # an error of every way is one of the inputs, and tells nothing of the model
            raise

    def _forward_mode(self, tensors: list[Any], inputs: Any) -> tuple[Array, Array]:
        weights, direction = tensors
        with tf.autodiff.ForwardAccumulator(weights, direction) as forward:
            logits = self._network.run(weights, inputs)
        return logits, forward.jvp(logits, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    def _two_reverse_passes(self, tensors: list[Any], inputs: Any) -> tuple[Array, Array]:
        weights, direction = tensors
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(weights)
                logits = self._network.run(weights, inputs)
            seed = tf.zeros_like(logits)
            outer.watch(seed)
            gradients = inner.gradient(logits, weights, seed, unconnected_gradients="zero")
            total = tf.add_n([tf.reduce_sum(g * d) for g, d in zip(gradients, direction, strict=True)])
        return logits, outer.gradient(total, seed, unconnected_gradients="zero")

    def _difference(self, theta: Params, directions: Sequence[Params], inputs: Any) -> tuple[Array, Array]:
        logits, tangents = self._network.outputs(theta, inputs), []
        for direction in directions:
            length = _norm(direction)
            if not length:
                tangents.append(tf.zeros_like(logits))
                continue
            epsilon = max(2.0**-52 if value.dtype == tf.float64 else 2.0**-23 for value in direction.values())
            size = _norm({name: theta[name] for name in direction}) or 1.0
            step = self.shorter * epsilon ** (1 / 3) * size / length
            ahead, behind = (
                self._network.outputs(
                    theta | {n: theta[n] + sign * step * value for n, value in direction.items()}, inputs
                )
                for sign in (1, -1)
            )
            tangents.append((ahead - behind) / (2 * step))
        return logits, tf.stack(tangents)


def _norm(values: Params) -> float:
    return math.sqrt(sum(float(tf.reduce_sum(tf.square(tf.cast(value, tf.float64)))) for value in values.values()))
