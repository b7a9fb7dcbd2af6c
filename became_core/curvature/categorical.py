"""The categorical likelihood: the softmax cross-entropy, its gradients by the logits, slopes and curvatures.

With logits z, probabilities p = softmax(z), the label c and its one-hot vector y, the gradient of a sample's loss by z
is p - y; a backward pass for taps begins with it. Along directions d_k in parameter space, with v_k = J d_k the
derivative of the logits:

    slope        g.d_k         = E_n[(p_n - y_n).v_nk]
    curvature    d_k.GGN.d_l   = E_n[Cov_{c ~ p_n}(v_nkc, v_nlc)]    (for k = l, the variance of v_nk under p_n)

Means are over samples or over positions, as ``by`` says; ``units`` counts them. Squares of gradients are those of
samples, unless ``squares`` says otherwise: with labels drawn from the model, the products of two positions' gradients
have the mean zero, so their sum estimates the sum over positions without bias.

Convention: as in ``base.py``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from became_core.arrays import Array, device, in_single, namespace, row_products
from became_core.curvature.base import Likelihood, TapMode
from became_core.errors import BecameError

__all__ = ["Categorical", "derivative_sums", "log_softmax", "logit_cotangents"]

Unit = Literal["sample", "token"]


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of several classes, by a softmax.

    Attributes:
        by: whether a mean is over samples, or over all positions that have a label.
        ignored: the label of positions that do not count.
        weights: the weight of each class; 1 each if not given. A mean divides by the sum of weights, as PyTorch's does.
        shift: whether outputs are predictions of the next position's label, as a causal language model's are.
        squares: whose gradients are squared, where there are several positions: those of each sample's loss, or those
            of each position's own, for which there is a backward pass for each position.

    Examples:
        >>> outputs, targets = np.zeros((1, 2, 2)), np.array([[0, -100]])
        >>> Categorical(by="token").units(outputs, targets)
        1.0
        >>> float(Categorical(by="token").loss(outputs, targets).round(4))
        0.6931
        >>> apart = Categorical(squares="token").cotangents(outputs, targets, "empirical", np.random.default_rng(0))
        >>> [np.abs(gradient).tolist() for gradient in apart]
        [[[[0.5, 0.5], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]]
    """

    has_labels: ClassVar[bool] = True

    by: Unit = "sample"
    ignored: int = -100
    weights: tuple[float, ...] | None = None
    shift: bool = False
    squares: Unit = "sample"

    def units(self, outputs: Array, targets: Array) -> float:
        """Return the weights' sum over samples, or over positions; a sample has its largest one's."""
        targets = self._labels(targets)
        _, _, weights = self._flat(self._own(outputs), targets)
        xp = namespace(weights=weights)
        if self.by == "token" or len(targets.shape) == 1:
            return float(xp.sum(weights))
        return float(xp.sum(xp.max(xp.reshape(weights, (targets.shape[0], -1)), axis=1)))

    @property
    def is_plain(self) -> bool:
        """Whether the loss is the mean cross-entropy of all labels, which frameworks compute themselves."""
        return self == Categorical()

    @property
    def unit(self) -> str:
        """Nats, or bits where there is a label for every token."""
        return "nats" if self.by == "sample" else "bits per token"

    def natural(self, mean_loss: float, outputs: int) -> float:
        """Return the loss in nats, or in bits where there is a label for every token."""
        return mean_loss if self.by == "sample" else mean_loss / math.log(2)

    def count(self, targets: Array) -> float:
        """Return the number of samples or of positions that count; weighed, if classes have weights."""
        counted = self._labels(targets) != self.ignored
        xp: Any = namespace(targets=targets)
        if self.weights is None:
            counted = counted if self.by == "token" else xp.any(xp.reshape(counted, (targets.shape[0], -1)), axis=1)
            return float(xp.count_nonzero(counted))
        outputs = xp.zeros((*targets.shape, len(self.weights)), device=device(targets))
        return self.units(outputs, targets)

    def hits(self, outputs: Array, targets: Array, first: int = 0) -> tuple[int, int]:
        """Return for how many of the labels that count the largest logit is that of the label, and how many count."""
        outputs, targets = self._own(outputs), self._labels(targets)
        xp: Any = namespace(outputs=outputs, targets=targets)
        counted = targets != self.ignored
        right = xp.logical_and(counted, xp.argmax(outputs, axis=-1) == targets + first)
        return int(xp.count_nonzero(right)), int(xp.count_nonzero(counted))

    def mean_loss(self, outputs: Array, targets: Array) -> Array:
        """Return the mean cross-entropy, a 0-d array; unlike ``loss / units`` it can be compiled."""
        own = self._labels(targets)
        _, _, weights = self._flat(self._own(outputs), own)
        xp: Any = namespace(weights=weights)
        if self.by == "sample" and len(targets.shape) > 1:
            weights = xp.max(xp.reshape(weights, (-1, math.prod(own.shape[1:]))), axis=1)
        return self.loss(outputs, targets) / xp.sum(weights)

    def loss(self, outputs: Array, targets: Array) -> Array:
        """Return the sum of all positions' cross-entropies."""
        logits, labels, weights = self._flat(self._own(outputs), self._labels(targets))
        xp = namespace(logits=logits)
        at_label = xp.take_along_axis(log_softmax(logits), labels[:, None], axis=-1)[:, 0]
        return -xp.sum(weights * at_label)

    def cotangents(self, outputs: Array, targets: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
        """Yield w (p - y), y being the labels given, drawn, or each class in turn."""
        own = self._own(outputs)
        logits, labels, weights = self._flat(own, self._labels(targets))
        if mode == "true" and self.squares == "sample" and logits.shape[0] != outputs.shape[0]:
            raise BecameError(
                "the exact expectation over labels is for one label a sample; with one for each position, choose "
                "'sampled', whose mean is the same, 'empirical', or squares='token'."
            )
        xp = namespace(logits=logits)
        for gradient in logit_cotangents(logits, labels, mode, rng):
            # Squares of labels that are the model's own add up to the curvature, w (diag p - p p^T).
            factor = xp.sqrt(weights) if mode in ("true", "sampled") else weights
            whole = xp.astype(xp.reshape(gradient * factor[:, None], (-1, *own.shape[1:])), outputs.dtype, copy=False)
            for scaled in self._squared_apart(xp, whole):
                if self.shift:
                    scaled = xp.concat([scaled, xp.zeros_like(outputs[:, :1, ...])], axis=1)
                yield scaled

    def derivatives(self, outputs: Array, tangents: Array, targets: Array) -> tuple[Array, Array]:
        """Return the sums of w (p - y) . v_k and of w Cov_{c ~ p}(v_kc, v_lc)."""
        if self.shift:
            tangents = tangents[:, :, :-1, ...]
        logits, labels, weights = self._flat(self._own(outputs), self._labels(targets))
        tangents = namespace(tangents=tangents).reshape(tangents, (tangents.shape[0], *logits.shape))
        return derivative_sums(logits, tangents, labels, weights)

    def _squared_apart(self, xp: Any, gradient: Array) -> Iterator[Array]:
        """Yield the parts of a gradient by the outputs that are squared by themselves, each of its shape."""
        if self.squares == "sample" or len(gradient.shape) == 2:
            yield gradient
            return
        count = math.prod(gradient.shape[1:-1])
        rows = xp.reshape(gradient, (-1, count, gradient.shape[-1]))
        positions = xp.arange(count, device=device(rows))[None, :, None]
        for position in range(count):
            part = xp.where(positions == position, rows, xp.zeros_like(rows))
            yield xp.reshape(part, (-1, *gradient.shape[1:]))

    def _own(self, array: Array) -> Array:
        """Return outputs [N, L, C] or targets [N, L] without what has no counterpart, if predictions are shifted."""
        if not self.shift:
            return array
        return array[:, :-1, ...] if len(array.shape) > 2 else array[:, 1:]

    def _labels(self, targets: Array) -> Array:
        """Return the targets that count, as ``_own`` does; integers in the dtype of indices.

        In a narrower one -100 can be a label's number, the number of classes need not fit, and PyTorch takes no index.
        """
        own = self._own(targets)
        xp: Any = namespace(targets=own)
        return xp.astype(own, xp.result_type(xp.int64), copy=False) if xp.isdtype(own.dtype, "integral") else own

    def _flat(self, outputs: Array, targets: Array) -> tuple[Array, Array, Array]:
        """Return logits [M, C], labels [M] and weights [M]; the weight of a position that does not count is 0.

        Logits and weights are in at least float32.
        """
        xp: Any = namespace(outputs=outputs, targets=targets)
        if tuple(outputs.shape[:-1]) != tuple(targets.shape):
            raise BecameError(
                f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; a categorical "
                "likelihood needs a label for each row of logits, [samples, ..., classes] and [samples, ...]."
            )
        logits, labels = in_single(xp.reshape(outputs, (-1, outputs.shape[-1]))), xp.reshape(targets, (-1,))
        counts = labels != self.ignored
        labels = xp.where(counts, labels, xp.zeros_like(labels))
        weights = xp.astype(counts, logits.dtype)
        if self.weights is not None:
            of_class = xp.asarray(self.weights, dtype=logits.dtype, device=device(logits))
            weights = weights * xp.take(of_class, labels, axis=0)
        return logits, labels, weights


def log_softmax(logits: Array) -> Array:
    """Return the logarithm of the softmax over the last axis, in at least float32."""
    xp, logits = namespace(logits=logits), in_single(logits)
    # The largest logit is subtracted so that no exponential overflows; it cancels in the result.
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def logit_cotangents(logits: Array, labels: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
    """Yield the gradients by the logits, [samples, classes], with which backward passes begin, in the logits' dtype.

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
            yield xp.astype(root * (p - _one_hot(xp, xp.full_like(labels, label), p)), logits.dtype, copy=False)
        return
    if mode == "logit":
        yield _one_hot(xp, labels, logits)
        return
    if mode == "sampled":
        # The index of the largest of log p + Gumbel noise is a draw from p.
        noise = xp.asarray(rng.gumbel(size=tuple(logits.shape)), dtype=p.dtype, device=device(p))
        labels = xp.argmax(log_p + noise, axis=1)
    elif mode == "published":
        labels = xp.argmax(logits, axis=1)
    yield xp.astype(p - _one_hot(xp, labels, p), logits.dtype, copy=False)


def _one_hot(xp: Any, labels: Array, like: Array) -> Array:
    classes = xp.arange(like.shape[1], dtype=labels.dtype, device=device(labels))
    return xp.astype(labels[:, None] == classes, like.dtype)


def derivative_sums(logits: Array, tangents: Array, labels: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Return the sums over rows of the slopes, [K], and of the curvatures, [K, K], along K directions.

    They are in at least float32.

    Args:
        logits: [rows, classes].
        tangents: the derivatives of the logits, [K, rows, classes].
        labels: integers [rows].
        weights: how much each row counts, [rows]; 1 each if not given.
    """
    xp = namespace(logits=logits, tangents=tangents, labels=labels)
    p, tangents = xp.exp(log_softmax(logits)), in_single(tangents)
    expected = xp.sum(p * tangents, axis=-1, keepdims=True)
    at_label = xp.take_along_axis(tangents, xp.broadcast_to(labels[None, :, None], expected.shape), axis=-1)
    # The covariance is computed from centred values; E[v v] - E[v] E[v] would cancel where the variance is small.
    centred, slopes = tangents - expected, expected - at_label
    if weights is not None:
        p, slopes = p * weights[:, None], slopes * weights[:, None]
    rows = (tangents.shape[0], -1)
    curvature = row_products(xp.reshape(p * centred, rows), xp.reshape(centred, rows))
    # The product is symmetric up to rounding; the mean with its transpose is symmetric to the bit.
    symmetric = (curvature + xp.matrix_transpose(curvature)) / 2
    return xp.sum(slopes, axis=(1, 2)), symmetric
