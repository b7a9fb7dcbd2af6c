"""Where a backward pass for taps begins: at the logits, with gradients that the mode chooses.

For cross-entropy with logits z, p = softmax(z) and label c, the gradient of a sample's loss by z is p - e_c.

Convention: gradients of each sample's own loss, [samples, classes]; nothing is divided by a number of samples.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from became_core.arrays import Array, device, namespace
from became_core.curvature.directional import log_softmax

__all__ = ["TapMode", "logit_cotangents"]

# "empirical": labels as given.
# "true": every label c, each of the C passes scaled by sqrt(p_c), so that the plain sum of squares over all passes is
#     the exact expectation over the model's own labels; for cross-entropy that is the exact diagonal of the GGN.
# "sampled": one label a sample, drawn from the model's p: the same by Monte-Carlo.
# "logit": the gradient of the logit of the label given, instead of that of the loss.
# "published": the model's most likely labels.
# "inputs": none: a forward pass alone, of matrices; its taps' output gradients are empty.
# In all but "published" there is no dropout and batch statistics are constants, so that per-sample gradients exist;
# there dropout is on and batch statistics are part of the gradient, which is then that of the batch's summed loss.
TapMode = Literal["empirical", "true", "sampled", "logit", "published", "inputs"]


def logit_cotangents(logits: Array, labels: Array, mode: TapMode, stream: np.random.Generator) -> Iterator[Array]:
    """Yield the gradients by the logits, [samples, classes], that backward passes begin with.

    Args:
        logits: [samples, classes], of the task's head.
        labels: as given, integers [samples].
        mode: which gradients; "true" has as many passes as there are classes, "inputs" none, the others one.
        stream: where "sampled" draws its labels from, so many for each batch whatever the logits are.
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
        # The largest of log p + Gumbel noise is a draw from p.
        noise = xp.asarray(stream.gumbel(size=tuple(logits.shape)), dtype=p.dtype, device=device(p))
        labels = xp.argmax(log_p + noise, axis=1)
    elif mode == "published":
        labels = xp.argmax(logits, axis=1)
    yield p - _one_hot(xp, labels, p)


def _one_hot(xp: Any, labels: Array, like: Array) -> Array:
    classes = xp.arange(like.shape[1], dtype=labels.dtype, device=device(labels))
    return xp.astype(labels[:, None] == classes, like.dtype)
