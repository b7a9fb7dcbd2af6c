"""Derivatives of the softmax cross-entropy: gradients by the logits, and slopes and curvatures along directions.

With logits z, probabilities p = softmax(z), the label c and its one-hot vector y, the gradient of a sample's loss by z
is p - y; a backward pass for taps begins with it. Along directions d_k in parameter space, with v_k = J d_k the
derivative of the logits:

    slope        g.d_k         = E_n[(p_n - y_n).v_nk]
    curvature    d_k.GGN.d_l   = E_n[Cov_{c ~ p_n}(v_nkc, v_nlc)]    (for k = l, the variance of v_nk under p_n)

Both are exact: the logits' derivatives come from forward-mode differentiation.

Convention: gradients by the logits are those of each sample's own loss, not divided by the number of samples. Slopes
and curvatures are means over samples.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from became_core.arrays import Array, device, namespace

__all__ = ["Pushforward", "TapMode", "derivative_sums", "log_softmax", "logit_cotangents"]

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
        logits: [samples, classes].
        tangents: the derivatives of the logits, [K, samples, classes].
        labels: integers [samples].
    """

    logits: Array
    tangents: Array
    labels: Array


def log_softmax(logits: Array) -> Array:
    """Return the logarithm of the softmax over the last axis."""
    xp = namespace(logits=logits)
    # The largest logit is subtracted so that no exponential overflows; it cancels in the result.
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def logit_cotangents(logits: Array, labels: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
    """Yield the gradients by the logits, [samples, classes], with which backward passes begin.

    Args:
        logits: [samples, classes], of the task's head.
        labels: the labels of the data, integers [samples].
        mode: which gradients; "true" yields one for each class, "inputs" none, and any other mode one.
        rng: the generator that "sampled" draws its labels from. The number of draws depends on the shape of the logits
            alone, so that later draws are the same for any network.

    Examples:
        >>> logits, labels = np.zeros((1, 2)), np.array([0])
        >>> list(logit_cotangents(logits, labels, "empirical", np.random.default_rng(0)))
        [array([[-0.5,  0.5]])]
    """
    xp = namespace(logits=logits, labels=labels)
    log_p = log_softmax(logits)
    p = xp.exp(log_p)
    if mode == "inputs":
        return
    if mode == "true":
        for label in range(logits.shape[1]):
            root = xp.exp(0.5 * log_p[:, label : label + 1])
            yield root * (p - _one_hot(xp, xp.full_like(labels, label), p))
        return
    if mode == "logit":
        yield _one_hot(xp, labels, p)
        return
    if mode == "sampled":
        # The index of the largest of log p + Gumbel noise is a draw from p.
        noise = xp.asarray(rng.gumbel(size=tuple(logits.shape)), dtype=p.dtype, device=device(p))
        labels = xp.argmax(log_p + noise, axis=1)
    elif mode == "published":
        labels = xp.argmax(logits, axis=1)
    yield p - _one_hot(xp, labels, p)


def _one_hot(xp: Any, labels: Array, like: Array) -> Array:
    classes = xp.arange(like.shape[1], dtype=labels.dtype, device=device(labels))
    return xp.astype(labels[:, None] == classes, like.dtype)


def derivative_sums(logits: Array, tangents: Array, labels: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Return the sums over rows of the slopes, [K], and of the curvatures, [K, K], along K directions.

    Args:
        logits: [rows, classes].
        tangents: the derivatives of the logits, [K, rows, classes].
        labels: integers [rows].
        weights: how much each row counts, [rows]; 1 each if not given.
    """
    xp = namespace(logits=logits, tangents=tangents, labels=labels)
    p = xp.exp(log_softmax(logits))
    expected = xp.sum(p * tangents, axis=-1, keepdims=True)
    at_label = xp.take_along_axis(tangents, xp.broadcast_to(labels[None, :, None], expected.shape), axis=-1)
    # The covariance is computed from centred values; E[v v] - E[v] E[v] would cancel where the variance is small.
    centred, slopes = tangents - expected, expected - at_label
    if weights is not None:
        p, slopes = p * weights[:, None], slopes * weights[:, None]
    rows = (tangents.shape[0], -1)
    weighted = xp.reshape(p * centred, rows)
    curvature = xp.matmul(weighted, xp.matrix_transpose(xp.reshape(centred, rows)))
    # The product is symmetric up to rounding; the mean with its transpose is symmetric to the bit.
    symmetric = (curvature + xp.matrix_transpose(curvature)) / 2
    return xp.sum(slopes, axis=(1, 2)), symmetric
