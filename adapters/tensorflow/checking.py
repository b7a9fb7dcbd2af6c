"""A user's Keras model in a loop of the user's own, as the check of ``adapters/backend/checking.py`` sees it.

Convention: parameters have the names and layouts of ``adapters/tensorflow/parameters.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from adapters.backend.checking import STEPS, agreement
from adapters.backend.own_loop import Finding
from adapters.tensorflow.derivatives import Derivatives
from adapters.tensorflow.parameters import layers_of
from adapters.tensorflow.tapping import Tapping
from adapters.tensorflow.traced import KerasFunction, samples_of
from became_core.arrays import Array, Params, namespace
from became_core.curvature import Taps

__all__ = ["KerasView"]


class KerasView:
    """A model on a few samples; its attributes are those of a ``NetworkView``."""

    steps = STEPS
    padding: Mapping[str, int] = {}
    mixes_samples = False

    def __init__(
        self, network: KerasFunction, tapping: Tapping, derivatives: Derivatives, theta: Params, inputs: Any
    ) -> None:
        """Keep them.

        Args:
            network: the model as a function.
            tapping: what collects its taps.
            derivatives: what differentiates along directions.
            theta: the weights that the model has.
            inputs: of a few samples.
        """
        self._network, self._tapping, self._derivatives = network, tapping, derivatives
        self.theta, self._inputs = theta, inputs
        eagerly = network.run(network.in_order(theta), inputs)
        self._dtype = eagerly.dtype
        dtypes = {tf.as_dtype(layer.compute_dtype) for layer in layers_of(network.model)}
        xp = namespace(outputs=eagerly)
        self.rounding = max((float(xp.finfo(dtype).eps) for dtype in dtypes if dtype.is_floating), default=0.0)
        ours = network.outputs(theta, inputs)
        self.agreement: Sequence[Finding] = [agreement(ours, eagerly, "evaluation", self.rounding)]

    @property
    def way(self) -> str:
        """How derivatives along directions were computed last."""
        return self._derivatives.way

    def outputs(self, theta: Params, samples: slice) -> Array:
        """Return the logits of some of the samples."""
        return self._network.outputs(theta, samples_of(self._inputs, samples))

    def seed(self, outputs: Array) -> Array:
        """Return random gradients by the logits."""
        return tf.constant(np.random.default_rng(0).normal(size=outputs.shape), outputs.dtype)

    def taps(self, seed: NDArray[Any]) -> Taps:
        """Return the taps of the backward pass that begins with these gradients."""
        return self._tapping.taps(self.theta, self._inputs, tf.cast(seed, self._dtype))

    def gradients(self, samples: slice, seed: NDArray[Any]) -> Params:
        """Return the gradients of some of the samples alone."""
        return self._network.gradient(self.theta, samples_of(self._inputs, samples), tf.cast(seed, self._dtype))

    def along(self, direction: Params, shorter: float) -> Array:
        """Return the derivative of the logits along a direction; if by a difference, with a shorter step."""
        way = self._derivatives if shorter == 1 else Derivatives(self._network, "difference", shorter)
        return way.along(self.theta, [direction], self._inputs)[1][0]
