"""A user's function of JAX in a loop of the user's own, as the check of ``adapters/backend/checking.py`` sees it.

Convention: parameters go by dotted paths in the user's tree; outputs are [samples, ...]. What is computed of parameters
that processes share is whole in each of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from adapters.backend.checking import STEPS, agreement
from adapters.backend.own_loop import Finding
from adapters.jax.derivatives import Derivatives
from adapters.jax.trees import here
from became_core.arrays import Array, Params
from became_core.curvature import Taps

__all__ = ["FunctionView"]


class FunctionView:
    """A function on a few samples; its attributes are those of a ``NetworkView``."""

    steps = STEPS
    padding: Mapping[str, int] = {}
    mixes_samples = False

    def __init__(
        self,
        theta: Params,
        samples: Callable[[slice], Any],
        *,
        outputs: Callable[[Params, Any], Array],
        own: Callable[[Any], Array],
        taps: Callable[[Any, Any], Taps],
        gradient: Callable[[Params, Any, Any], Params],
        derivatives: Derivatives,
        rounding: float,
    ) -> None:
        """Keep what computes, and compare the outputs with those of the function as it is.

        Args:
            theta: the trained parameters.
            samples: gives the inputs of some of the few samples.
            outputs: of parameters and inputs.
            own: the user's own function, of inputs.
            taps: of inputs and of gradients by the outputs.
            gradient: of parameters, inputs and gradients by the outputs.
            derivatives: what differentiates the outputs along directions.
            rounding: as of a view.
        """
        self.theta = {name: here(value) for name, value in theta.items()}  # in their order
        self._given, self._samples = theta, samples
        self._outputs, self._taps, self._gradient, self._derivatives = outputs, taps, gradient, derivatives
        everything = samples(slice(None))
        ours = here(outputs(theta, everything))
        self._dtype = ours.dtype
        self.rounding = rounding
        self.agreement: Sequence[Finding] = [agreement(ours, here(own(everything)), "evaluation", rounding)]

    @property
    def way(self) -> str:
        """How derivatives along directions were computed last."""
        return self._derivatives.way

    def outputs(self, theta: Params, samples: slice) -> Array:
        """Return the outputs of some of the samples."""
        return here(self._outputs(self._placed(theta), self._samples(samples)))

    def seed(self, outputs: Array) -> Array:
        """Return random gradients by the outputs."""
        return np.random.default_rng(0).normal(size=outputs.shape).astype(outputs.dtype)

    def taps(self, seed: NDArray[Any]) -> Taps:
        """Return the taps of the backward pass that begins with these gradients."""
        taps: Taps = here(self._taps(self._samples(slice(None)), seed.astype(self._dtype)))
        return taps

    def gradients(self, samples: slice, seed: NDArray[Any]) -> Params:
        """Return the gradients of some of the samples alone."""
        gradients: Params = here(self._gradient(self._given, self._samples(samples), seed.astype(self._dtype)))
        return gradients

    def along(self, direction: Params, shorter: float) -> Array:
        """Return the derivative of the outputs along a direction; if by a difference, with a shorter step."""
        of_all = self._given, [self._placed(direction)], self._samples(slice(None))
        tangents = self._derivatives.along(*of_all) if shorter == 1 else self._derivatives.difference(*of_all, shorter)
        return here(tangents[1][0])

    def _placed(self, values: Params) -> Params:
        """Return values that lie as the parameters of their names do."""
        return {
            name: value if like.is_fully_addressable else jax.device_put(np.asarray(value), like.sharding)
            for name, value, like in ((name, value, self._given[name]) for name, value in values.items())
        }
