"""The loss along one direction, with no approximation: slope and generalised Gauss-Newton curvature from one JVP.

For cross-entropy with logits z, probabilities p = softmax(z) and v = J delta (the logits' derivative along delta):

    g.delta         = E_n[(p_n - y_n).v_n]
    delta.GGN.delta = E_n[sum_k p_nk v_nk^2 - (sum_k p_nk v_nk)^2]      (the variance of v under p)

Convention: means over samples.
"""

from collections.abc import Iterable
from typing import NamedTuple

from became_core.arrays import Array, namespace
from became_core.errors import BecameError

__all__ = ["Pushforward", "derivatives_along", "log_softmax"]


class Pushforward(NamedTuple):
    """A batch's logits [samples, classes], their derivative along a direction, and its labels [samples]."""

    logits: Array
    tangent: Array
    labels: Array


def log_softmax(logits: Array) -> Array:
    """Return the logarithm of the softmax over the last axis."""
    xp = namespace(logits=logits)
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def derivatives_along(batches: Iterable[Pushforward]) -> tuple[Array, Array]:
    """Return (g.delta, delta.GGN.delta) of the mean cross-entropy over all batches, two 0-d arrays.

    Raises:
        BecameError: if there are no batches.
    """
    slope = curvature = None
    samples = 0
    for logits, tangent, labels in batches:
        xp = namespace(logits=logits, tangent=tangent, labels=labels)
        p = xp.exp(log_softmax(logits))
        expected = xp.sum(p * tangent, axis=-1, keepdims=True)
        at_label = xp.take_along_axis(tangent, labels[:, None], axis=-1)
        slope_part = xp.sum(expected - at_label)
        curvature_part = xp.sum(p * xp.square(tangent - expected))
        slope = slope_part if slope is None else slope + slope_part
        curvature = curvature_part if curvature is None else curvature + curvature_part
        samples += logits.shape[0]
    if slope is None or curvature is None:
        raise BecameError("a directional derivative needs at least one sample; none was given.")
    return slope / samples, curvature / samples
