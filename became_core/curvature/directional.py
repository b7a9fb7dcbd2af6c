"""The loss along directions, with no approximation: slopes and generalised Gauss-Newton curvature by forward mode.

For cross-entropy with logits z, probabilities p = softmax(z) and v_k = J d_k (the logits' derivative along d_k):

    g.d_k         = E_n[(p_n - y_n).v_nk]
    d_k.GGN.d_l   = E_n[Cov_{c ~ p_n}(v_nkc, v_nlc)]      (for one direction: the variance of v under p)

Convention: means over samples.
"""

from collections.abc import Iterable
from typing import NamedTuple

from became_core.arrays import Array, namespace
from became_core.errors import BecameError

__all__ = ["Pushforward", "derivatives_along", "log_softmax"]


class Pushforward(NamedTuple):
    """A batch's logits [samples, classes], their derivatives along K directions [K, samples, classes], its labels."""

    logits: Array
    tangents: Array
    labels: Array


def log_softmax(logits: Array) -> Array:
    """Return the logarithm of the softmax over the last axis."""
    xp = namespace(logits=logits)
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def derivatives_along(batches: Iterable[Pushforward]) -> tuple[Array, Array]:
    """Return slopes g.d_k [K] and curvatures d_k.GGN.d_l [K, K] of the mean cross-entropy over all batches.

    Raises:
        BecameError: if there are no batches.
    """
    slope = curvature = None
    samples = 0
    for batch in batches:
        slope_part, curvature_part = _sums(*batch)
        slope = slope_part if slope is None else slope + slope_part
        curvature = curvature_part if curvature is None else curvature + curvature_part
        samples += batch.logits.shape[0]
    if slope is None or curvature is None:
        raise BecameError("a directional derivative needs at least one sample; none was given.")
    return slope / samples, curvature / samples


def _sums(logits: Array, tangents: Array, labels: Array) -> tuple[Array, Array]:
    """The batch's slopes and curvatures, as sums over samples."""
    xp = namespace(logits=logits, tangents=tangents, labels=labels)
    p = xp.exp(log_softmax(logits))
    expected = xp.sum(p * tangents, axis=-1, keepdims=True)
    at_label = xp.take_along_axis(tangents, xp.broadcast_to(labels[None, :, None], expected.shape), axis=-1)
    centred = tangents - expected
    rows = (tangents.shape[0], -1)
    weighted = xp.reshape(p * centred, rows)
    curvature = xp.matmul(weighted, xp.matrix_transpose(xp.reshape(centred, rows)))
    symmetric = (curvature + xp.matrix_transpose(curvature)) / 2  # to the bit
    return xp.sum(expected - at_label, axis=(1, 2)), symmetric
