"""What every likelihood offers: a network's outputs, what they say of the targets, and the curvature of that.

Along directions in parameter space, with v_k the derivative of the outputs, a loss of gradient g by the outputs has the
slope g . v_k and the curvature v_k . H v_l, H being its curvature by the outputs: that of the generalised Gauss-Newton
matrix (GGN). Both are exact: the outputs' derivatives come from forward-mode differentiation.

A sample is what the first axis of the outputs counts. With a target for each of its positions (tokens), its loss is
their sum.

Convention: gradients are of each sample's own loss, not divided by anything, in the dtype of the outputs. Sums are
sums, and the caller divides them by the units, of which ``units`` says how many there are. They are computed and
returned in at least float32, whatever the dtype of the outputs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np

from became_core.arrays import Array, in_single, namespace

__all__ = ["Likelihood", "Pushforward", "TapMode"]

# Which gradient a backward pass begins with:
#
# "empirical": that of the loss at the label of the data.
# "true": that of the loss at every class c in turn, multiplied by sqrt(p_c). The plain sum of squares over these passes
#     is then the exact expectation over labels drawn from the model, which for cross-entropy is the exact diagonal of
#     the generalised Gauss-Newton matrix (GGN).
# "sampled": that of the loss at one label a sample, drawn from the model; it estimates the same expectation.
# "logit": that of the logit of the data's label, not of a loss.
# "published": that of the loss at the model's most likely label, as in the published code.
# "inputs": none. There is a forward pass alone, and only matrices have taps, whose output gradients are empty.
#
# In "published", dropout is on and batch statistics are differentiated, so the gradient is that of the batch's summed
# loss. In all other modes there is no dropout and batch statistics are constants, so that per-sample gradients exist.
TapMode = Literal["empirical", "true", "sampled", "logit", "published", "inputs"]


class Pushforward(NamedTuple):
    """A batch's logits and their derivatives along K directions.

    Attributes:
        logits: [samples, classes]; of text by token [samples, L, classes].
        tangents: the derivatives of the logits, [K, samples, classes], or [K, samples, L, classes].
        labels: the targets: integers [samples]; of text by token integers [samples, L]; of targets that are no labels
            numbers [samples, outputs].
    """

    logits: Array
    tangents: Array
    labels: Array


class Likelihood(ABC):
    """How probable targets are, given a network's outputs."""

    @property
    def unit(self) -> str:
        """The unit in which ``natural`` measures a mean loss."""
        return "nats"

    has_labels: ClassVar[bool] = False
    """Whether a target is a label, the number of one of the outputs."""

    predicts_numbers: ClassVar[bool] = False
    """Whether outputs are predictions of the targets, so that the two can be correlated."""

    is_standardised: ClassVar[bool] = True
    """Whether targets that are no labels are standardised before they are learned; not where they are probabilities."""

    @property
    def is_plain(self) -> bool:
        """Whether the loss is the mean cross-entropy of all labels, which frameworks compute themselves."""
        return False

    @abstractmethod
    def units(self, outputs: Array, targets: Array) -> float:
        """Return what a mean over these samples divides by."""

    @abstractmethod
    def loss(self, outputs: Array, targets: Array) -> Array:
        """Return the sum of all samples' losses, a 0-d array."""

    @abstractmethod
    def cotangents(self, outputs: Array, targets: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
        """Yield the gradients by the outputs with which backward passes begin, each of the outputs' shape.

        Args:
            outputs: [samples, ...].
            targets: what is given of the samples.
            mode: "empirical" for the targets given, "true" for as many passes as make the exact expectation over the
                model's own targets, "sampled" for targets drawn from the model.
            rng: what "sampled" draws from.

        Raises:
            BecameError: if there is no such mode for these outputs.
        """

    @abstractmethod
    def derivatives(self, outputs: Array, tangents: Array, targets: Array) -> tuple[Array, Array]:
        """Return the sums over samples of the slopes [K] and of the curvatures [K, K] along directions.

        Args:
            outputs: [samples, ...].
            tangents: the derivatives of the outputs along K directions, [K, samples, ...].
            targets: what is given of the samples.
        """

    def fitted(self, outputs: Array, targets: Array) -> Self:
        """Return the likelihood with what it must know of the data's noise, from some of them."""
        return self

    def count(self, targets: Array) -> float:
        """Return what a mean over samples with these targets divides by: ``units``, without the outputs."""
        return float(targets.shape[0])

    def hits(self, outputs: Array, targets: Array, first: int = 0) -> tuple[int, int]:
        """Return for how many labels the largest output is that of the label, and how many there are; 0, 0 if none.

        Args:
            outputs: [samples, ...], with an output for each label along the last axis.
            targets: what is given of the samples.
            first: the place of the label 0 among the outputs, if they are those of several heads.
        """
        if not self.has_labels:
            return 0, 0
        xp: Any = namespace(outputs=outputs, targets=targets)
        right = xp.argmax(outputs, axis=-1) == targets + first
        return int(xp.count_nonzero(right)), math.prod(targets.shape)

    def mean_loss(self, outputs: Array, targets: Array) -> Array:
        """Return the mean loss, a 0-d array; unlike ``loss / units`` it can be compiled."""
        xp: Any = namespace(outputs=outputs)
        # Where a function is compiled for batches of any size, the shape does not say how many samples there are.
        first = in_single(xp.reshape(outputs, (-1, math.prod(outputs.shape[1:])))[:, 0])
        return self.loss(outputs, targets) / xp.sum(xp.ones_like(first))

    def natural(self, mean_loss: float, outputs: int) -> float:
        """Return a mean loss in its natural unit.

        Args:
            mean_loss: in nats, over the units.
            outputs: how many outputs a sample or a position has.
        """
        return mean_loss
