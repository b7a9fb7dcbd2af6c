"""Likelihoods: what a network's outputs say of the targets, and the curvature of their negative logarithm.

| likelihood | loss of one target | gradient g by the outputs z | curvature by the outputs |
| --- | --- | --- | --- |
| ``Categorical`` | -w log softmax(z)[c] | w (p - y), y one-hot | w (diag p - p p^T) |
| ``Gaussian`` | sum_j (z_j - y_j)^2 / 2 s^2 | (z - y) / s^2 | 1 / s^2 |
| ``Bernoulli`` | sum_j log(1 + e^z_j) - y_j z_j | p - y, p the logistic of z | p (1 - p) |

Along directions in parameter space, with v_k the derivative of the outputs, a loss has the slope g . v_k and the
curvature v_k . H v_l, H being the curvature by the outputs: that of the generalised Gauss-Newton matrix (GGN).

A sample is what the first axis of the outputs counts. With a target for each of its positions (tokens), its loss is
their sum. Means are over samples or over positions, as ``by`` says; ``units`` counts them. Squares of gradients are
those of samples, unless ``squares`` says otherwise: with labels drawn from the model, the products of two positions'
gradients have the mean zero, so their sum estimates the sum over positions without bias.

Convention: gradients are of each sample's own loss, not divided by anything. Sums are sums, and the caller divides them
by the units.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from became_core.arrays import Array, device, namespace
from became_core.curvature.cross_entropy import (
    Pushforward,
    TapMode,
    derivative_sums,
    log_softmax,
    logit_cotangents,
)
from became_core.curvature.exchange import Exchange
from became_core.errors import BecameError

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "derivatives_along",
    "likelihood_named",
]

Unit = Literal["sample", "token"]


class Likelihood(ABC):
    """How probable targets are, given a network's outputs."""

    @property
    def unit(self) -> str:
        """The unit in which ``natural`` measures a mean loss."""
        return "nats"

    has_labels: ClassVar[bool] = False
    """Whether a target is a label, the number of one of the outputs."""

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

    def mean_loss(self, outputs: Array, targets: Array) -> Array:
        """Return the mean loss, a 0-d array; unlike ``loss / units`` it can be compiled."""
        xp: Any = namespace(outputs=outputs)
        # Where a function is compiled for batches of any size, the shape does not say how many samples there are.
        first = xp.reshape(outputs, (-1, math.prod(outputs.shape[1:])))[:, 0]
        return self.loss(outputs, targets) / xp.sum(xp.ones_like(first))

    def natural(self, mean_loss: float, outputs: int) -> float:
        """Return a mean loss in its natural unit.

        Args:
            mean_loss: in nats, over the units.
            outputs: how many outputs a sample or a position has.
        """
        return mean_loss


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
        targets = self._own(targets)
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
        if self.is_plain:
            return float(targets.shape[0])
        counted = self._own(targets) != self.ignored
        xp: Any = namespace(targets=targets)
        if self.weights is None:
            counted = counted if self.by == "token" else xp.any(xp.reshape(counted, (targets.shape[0], -1)), axis=1)
            return float(xp.count_nonzero(counted))
        outputs = xp.zeros((*targets.shape, len(self.weights)), device=device(targets))
        return self.units(outputs, targets)

    def mean_loss(self, outputs: Array, targets: Array) -> Array:
        """Return the mean cross-entropy, a 0-d array; unlike ``loss / units`` it can be compiled."""
        _, _, weights = self._flat(self._own(outputs), self._own(targets))
        xp: Any = namespace(weights=weights)
        if self.by == "sample" and len(targets.shape) > 1:
            weights = xp.max(xp.reshape(weights, (-1, *self._own(targets).shape[1:])), axis=1)
        return self.loss(outputs, targets) / xp.sum(weights)

    def loss(self, outputs: Array, targets: Array) -> Array:
        """Return the sum of all positions' cross-entropies."""
        logits, labels, weights = self._flat(self._own(outputs), self._own(targets))
        xp = namespace(logits=logits)
        at_label = xp.take_along_axis(log_softmax(logits), labels[:, None], axis=-1)[:, 0]
        return -xp.sum(weights * at_label)

    def cotangents(self, outputs: Array, targets: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
        """Yield w (p - y), y being the labels given, drawn, or each class in turn."""
        own = self._own(outputs)
        logits, labels, weights = self._flat(own, self._own(targets))
        if mode == "true" and self.squares == "sample" and logits.shape[0] != outputs.shape[0]:
            raise BecameError(
                "the exact expectation over labels is for one label a sample; with one for each position, choose "
                "'sampled', whose mean is the same, 'empirical', or squares='token'."
            )
        xp = namespace(logits=logits)
        for gradient in logit_cotangents(logits, labels, mode, rng):
            # Squares of labels that are the model's own add up to the curvature, w (diag p - p p^T).
            factor = xp.sqrt(weights) if mode in ("true", "sampled") else weights
            whole = xp.reshape(gradient * factor[:, None], (-1, *own.shape[1:]))
            for scaled in self._squared_apart(xp, whole):
                if self.shift:
                    scaled = xp.concat([scaled, xp.zeros_like(outputs[:, :1, ...])], axis=1)
                yield scaled

    def derivatives(self, outputs: Array, tangents: Array, targets: Array) -> tuple[Array, Array]:
        """Return the sums of w (p - y) . v_k and of w Cov_{c ~ p}(v_kc, v_lc)."""
        if self.shift:
            tangents = tangents[:, :, :-1, ...]
        logits, labels, weights = self._flat(self._own(outputs), self._own(targets))
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

    def _flat(self, outputs: Array, targets: Array) -> tuple[Array, Array, Array]:
        """Return logits [M, C], labels [M] and weights [M]; the weight of a position that does not count is 0."""
        xp: Any = namespace(outputs=outputs, targets=targets)
        if tuple(outputs.shape[:-1]) != tuple(targets.shape):
            raise BecameError(
                f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; a categorical "
                "likelihood needs a label for each row of logits, [samples, ..., classes] and [samples, ...]."
            )
        logits, labels = xp.reshape(outputs, (-1, outputs.shape[-1])), xp.reshape(targets, (-1,))
        counts = labels != self.ignored
        labels = xp.where(counts, labels, xp.zeros_like(labels))
        weights = xp.astype(counts, logits.dtype)
        if self.weights is not None:
            of_class = xp.asarray(self.weights, dtype=logits.dtype, device=device(logits))
            weights = weights * xp.take(of_class, labels, axis=0)
        return logits, labels, weights


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Real targets with independent noise of one standard deviation.

    Attributes:
        noise: the standard deviation, above 0; None for that of the residuals of the first data seen, ``fitted``.

    Raises:
        BecameError: if the standard deviation is not above 0.

    Examples:
        >>> float(Gaussian(noise=0.5).loss(np.array([[1.0]]), np.array([[0.0]])))
        2.0
    """

    noise: float | None = None

    @property
    def unit(self) -> str:
        """The root of the mean squared residual, in which ``natural`` measures a mean loss."""
        return "RMSE"

    def __post_init__(self) -> None:
        """Check the noise."""
        if self.noise is not None and not 0 < self.noise < float("inf"):
            raise BecameError(f"the noise of a Gaussian likelihood is {self.noise}; it must be above 0 and finite.")

    def fitted(self, outputs: Array, targets: Array) -> Self:
        """Return the likelihood with the root mean square of the residuals, unless the noise is known."""
        if self.noise is not None:
            return self
        residual = self._residual(outputs, targets)
        xp = namespace(residual=residual)
        square = float(xp.mean(residual * residual))
        return replace(self, noise=max(square, float(xp.finfo(residual.dtype).smallest_normal)) ** 0.5)

    def units(self, outputs: Array, targets: Array) -> float:
        """Return the number of samples."""
        return float(outputs.shape[0])

    def natural(self, mean_loss: float, outputs: int) -> float:
        """Return the root of the mean squared residual, over samples and outputs."""
        return math.sqrt(2 * mean_loss / self._precision / outputs)

    def loss(self, outputs: Array, targets: Array) -> Array:
        """Return the sum of squared residuals over 2 s^2."""
        residual = self._residual(outputs, targets)
        return namespace(residual=residual).sum(residual * residual) * (0.5 * self._precision)

    def cotangents(self, outputs: Array, targets: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
        """Yield (z - y) / s^2; or e_j / s for each output j; or noise / s."""
        xp: Any = namespace(outputs=outputs)
        if mode == "empirical":
            yield self._residual(outputs, targets) * self._precision
        elif mode == "true":
            yield from (unit * self._precision**0.5 for unit in _units(xp, outputs))
        elif mode == "sampled":
            noise = rng.standard_normal(tuple(outputs.shape))
            yield xp.asarray(noise, dtype=outputs.dtype, device=device(outputs)) * self._precision**0.5
        else:
            raise _no_mode("Gaussian", mode)

    def derivatives(self, outputs: Array, tangents: Array, targets: Array) -> tuple[Array, Array]:
        """Return the sums of (z - y) . v_k / s^2 and of v_k . v_l / s^2."""
        residual = self._residual(outputs, targets)
        xp: Any = namespace(residual=residual, tangents=tangents)
        rows = xp.reshape(tangents, (tangents.shape[0], -1))
        slope = xp.sum(rows * xp.reshape(residual, (1, -1)), axis=1)
        return slope * self._precision, _gram(xp, rows, None) * self._precision

    @property
    def _precision(self) -> float:
        if self.noise is None:
            raise BecameError("the noise of a Gaussian likelihood is not known yet; give it, or call fitted.")
        return self.noise**-2

    def _residual(self, outputs: Array, targets: Array) -> Array:
        return outputs - _alike(outputs, targets)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent yes-or-no targets, by a logistic function each: several labels for a sample.

    Examples:
        >>> float(Bernoulli().loss(np.array([[0.0]]), np.array([[1.0]])).round(4))
        0.6931
    """

    is_standardised: ClassVar[bool] = False

    def units(self, outputs: Array, targets: Array) -> float:
        """Return the number of samples."""
        return float(outputs.shape[0])

    def loss(self, outputs: Array, targets: Array) -> Array:
        """Return the sum of binary cross-entropies."""
        xp = namespace(outputs=outputs)
        # log(1 + e^z), without an exponential that could overflow.
        softplus = xp.clip(outputs, 0.0, None) + xp.log1p(xp.exp(-xp.abs(outputs)))
        return xp.sum(softplus - _alike(outputs, targets) * outputs)

    def cotangents(self, outputs: Array, targets: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
        """Yield p - y, y being given or drawn; or sqrt(p (1 - p)) e_j for each output j."""
        xp: Any = namespace(outputs=outputs)
        p = _logistic(xp, outputs)
        if mode == "empirical":
            yield p - _alike(outputs, targets)
        elif mode == "true":
            yield from (unit * xp.sqrt(p * (1 - p)) for unit in _units(xp, outputs))
        elif mode == "sampled":
            draw = xp.asarray(rng.uniform(size=tuple(outputs.shape)), dtype=p.dtype, device=device(p))
            yield p - xp.astype(draw < p, p.dtype)
        else:
            raise _no_mode("Bernoulli", mode)

    def derivatives(self, outputs: Array, tangents: Array, targets: Array) -> tuple[Array, Array]:
        """Return the sums of (p - y) . v_k and of sum_j p_j (1 - p_j) v_kj v_lj."""
        xp: Any = namespace(outputs=outputs, tangents=tangents)
        p = _logistic(xp, outputs)
        rows = xp.reshape(tangents, (tangents.shape[0], -1))
        slope = xp.sum(rows * xp.reshape(p - _alike(outputs, targets), (1, -1)), axis=1)
        return slope, _gram(xp, rows, xp.reshape(p * (1 - p), (-1,)))


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
}


def derivatives_along(
    batches: Iterable[Pushforward], likelihood: Likelihood | None = None, exchange: Exchange | None = None
) -> tuple[Array, Array]:
    """Return the slopes g.d_k [K] and curvatures d_k.GGN.d_l [K, K] of the mean loss over all batches.

    Args:
        batches: the outputs of each batch, their derivatives along K directions, and its targets.
        likelihood: what the loss is; categorical, a label a sample, if None.
        exchange: if the batches are shared out among processes, how their sums are added.

    Raises:
        BecameError: if there are no batches.

    Examples:
        >>> batch = Pushforward(np.zeros((1, 2)), np.array([[[1.0, -1.0]]]), np.array([0]))
        >>> derivatives_along([batch])
        (array([-1.]), array([[1.]]))
    """
    likelihood = Categorical() if likelihood is None else likelihood
    slope = curvature = None
    units = 0.0
    for outputs, tangents, targets in batches:
        slope_part, curvature_part = likelihood.derivatives(outputs, tangents, targets)
        slope = slope_part if slope is None else slope + slope_part
        curvature = curvature_part if curvature is None else curvature + curvature_part
        units += likelihood.count(targets)
    if slope is None or curvature is None:
        raise BecameError("a directional derivative needs at least one sample; none was given.")
    if exchange is not None:
        xp: Any = namespace(slope=slope)
        count = xp.asarray(units, dtype=xp.float64, device=device(slope))
        sums = exchange.total({"slope": slope, "curvature": curvature, "units": count})
        slope, curvature, units = sums["slope"], sums["curvature"], float(sums["units"])
    return slope / units, curvature / units


def likelihood_named(name: str) -> Likelihood:
    """Return the likelihood of a name, with its defaults.

    Raises:
        BecameError: if there is none.

    Examples:
        >>> likelihood_named("gaussian")
        Gaussian(noise=None)
    """
    if name not in LIKELIHOODS:
        raise BecameError(f"there is no likelihood '{name}'; choose from {', '.join(LIKELIHOODS)}, or give a loss.")
    return LIKELIHOODS[name]()


def _no_mode(name: str, mode: TapMode) -> BecameError:
    return BecameError(f"a {name} likelihood has no gradients of the mode '{mode}'; use empirical, true or sampled.")


def _alike(outputs: Array, targets: Array) -> Array:
    """Return targets in the dtype of the outputs.

    Raises:
        BecameError: if they have another shape, which would be broadcast to a wrong loss in silence.
    """
    xp = namespace(outputs=outputs, targets=targets)
    if tuple(outputs.shape) != tuple(targets.shape):
        raise BecameError(
            f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; make them equal."
        )
    return xp.astype(targets, outputs.dtype, copy=False)


def _logistic(xp: Any, outputs: Array) -> Array:
    # exp(-|z|) cannot overflow.
    decayed = xp.exp(-xp.abs(outputs))
    return xp.where(outputs >= 0, 1 / (1 + decayed), decayed / (1 + decayed))


def _units(xp: Any, outputs: Array) -> Iterator[Array]:
    """Yield, for each output of a sample, an array of the outputs' shape that is 1 there and 0 elsewhere."""
    width = int(np.prod(tuple(outputs.shape[1:])))
    positions = xp.arange(width, device=device(outputs))
    for index in range(width):
        row = xp.astype(positions == index, outputs.dtype)
        yield xp.broadcast_to(xp.reshape(row, (1, *outputs.shape[1:])), outputs.shape)


def _gram(xp: Any, tangents: Array, weights: Array | None) -> Array:
    """Return the sum of w v_k v_l, [K, K], symmetric to the bit."""
    rows = xp.reshape(tangents, (tangents.shape[0], -1))
    weighted = rows if weights is None else rows * xp.reshape(weights, (1, -1))
    gram = xp.matmul(weighted, xp.matrix_transpose(rows))
    return (gram + xp.matrix_transpose(gram)) / 2
