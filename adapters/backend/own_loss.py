"""A loss of the user's own, as a likelihood: what a method around a user's loop needs of it, and no more.

Convention: such a loss is (outputs, targets) -> the mean over the samples of a batch, one number; outputs are
[samples, ...].
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from became_core import BecameError
from became_core.arrays import Array, in_single
from became_core.curvature import Likelihood, TapMode

__all__ = ["OwnLoss", "as_given"]


@dataclass(frozen=True)
class OwnLoss(Likelihood):
    """A loss of the user's own; a framework says how its gradient by the outputs is taken.

    It has the empirical Fisher information and a gradient. It has no targets of the model's own, and no curvature by
    the outputs; curvature along a direction is taken as a difference of slopes.

    Attributes:
        function: the user's loss.
    """

    function: Callable[..., Any]

    @abstractmethod
    def gradient(self, outputs: Array, targets: Any) -> Array:
        """Return the gradient of the sum of all samples' losses by the outputs; raises as ``value`` does.

        The mean is multiplied by the number of samples before it is differentiated: gradients of a mean, which are
        small, would be rounded to 0 in float16.
        """

    def called(self, outputs: Array, targets: Any) -> Array:
        """Return what the function returns."""
        loss: Array = self.function(outputs, targets)
        return loss

    def value(self, outputs: Array, targets: Any) -> Array:
        """Return the mean loss of a batch.

        Raises:
            BecameError: if it is no single number.
        """
        loss = self.called(outputs, targets)
        shape = list(getattr(loss, "shape", ()))
        if shape:
            raise BecameError(f"the loss has shape {shape}; it must return one number, the batch's mean.")
        return loss

    def units(self, outputs: Array, targets: Any) -> float:
        """Return the number of samples."""
        return float(outputs.shape[0])

    def loss(self, outputs: Array, targets: Any) -> Array:
        """Return the sum of all samples' losses, in at least float32."""
        return in_single(self.value(outputs, targets)) * outputs.shape[0]

    def cotangents(self, outputs: Array, targets: Any, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
        """Yield the gradient of the sum of all samples' losses.

        Raises:
            BecameError: if targets of the model's own are asked for.
        """
        if mode != "empirical":
            raise BecameError(f"a loss of your own has no targets of the model's own; '{mode}' needs a likelihood.")
        yield self.gradient(outputs, targets)

    def derivatives(self, outputs: Array, tangents: Array, targets: Any) -> tuple[Array, Array]:
        """Raise a BecameError: there is no curvature by the outputs."""
        raise BecameError("a loss of your own has no curvature by the outputs; take it as a difference of slopes.")


def as_given(loss: Likelihood) -> Any:
    """Return a likelihood as it is, and of a loss of the user's own the function."""
    return loss.function if isinstance(loss, OwnLoss) else loss
