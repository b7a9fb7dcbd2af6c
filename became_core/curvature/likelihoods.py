"""Likelihoods: what a network's outputs say of the targets, and the curvature of their negative logarithm.

| likelihood | loss of one target | gradient g by the outputs z | curvature by the outputs |
| --- | --- | --- | --- |
| ``Categorical`` | -w log softmax(z)[c] | w (p - y), y one-hot | w (diag p - p p^T) |
| ``Gaussian`` | sum_j (z_j - y_j)^2 / 2 s^2 | (z - y) / s^2 | 1 / s^2 |
| ``Bernoulli`` | sum_j log(1 + e^z_j) - y_j z_j | p - y, p the logistic of z | p (1 - p) |

Of a Bernoulli likelihood all is computed from e^-|z|. So what is left of a loss, a gradient or a curvature at a large
logit of the right sign is as accurate as anywhere, and for both signs alike; p itself would be rounded to 1.

The categorical one is in ``categorical.py``, and what all offer in ``base.py``, with the convention.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from became_core.arrays import Array, device, in_single, namespace, row_products
from became_core.curvature.base import Likelihood, Pushforward, TapMode
from became_core.curvature.categorical import Categorical
from became_core.curvature.exchange import Exchange
from became_core.errors import BecameError

__all__ = ["LIKELIHOODS", "Bernoulli", "Gaussian", "derivatives_along", "likelihood_named"]


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

    predicts_numbers: ClassVar[bool] = True

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
            yield xp.astype(self._residual(outputs, targets) * self._precision, outputs.dtype, copy=False)
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
        rows = in_single(xp.reshape(tangents, (tangents.shape[0], -1)))
        slope = xp.sum(rows * xp.reshape(residual, (1, -1)), axis=1)
        return slope * self._precision, _gram(xp, rows, None) * self._precision

    @property
    def _precision(self) -> float:
        if self.noise is None:
            raise BecameError("the noise of a Gaussian likelihood is not known yet; give it, or call fitted.")
        return self.noise**-2

    def _residual(self, outputs: Array, targets: Array) -> Array:
        outputs = in_single(outputs)
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
        xp, outputs = namespace(outputs=outputs), in_single(outputs)
        # Where z is not negative, log(1 + e^z) is log(1 + e^-z) + z. One condition decides of both terms, so that at 0,
        # where |z| has no derivative, the loss has its own.
        is_positive = outputs >= 0
        slope = xp.astype(is_positive, outputs.dtype) - _alike(outputs, targets)
        return xp.sum(slope * outputs + xp.log1p(xp.exp(xp.where(is_positive, -outputs, outputs))))

    def cotangents(self, outputs: Array, targets: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
        """Yield p - y, y being given or drawn; or sqrt(p (1 - p)) e_j for each output j."""
        xp: Any = namespace(outputs=outputs)
        z = in_single(outputs)
        if mode == "empirical":
            yield xp.astype(_residual(xp, z, _alike(z, targets)), outputs.dtype, copy=False)
        elif mode == "true":
            root = xp.exp(-0.5 * xp.abs(z)) / (1 + xp.exp(-xp.abs(z)))
            yield from (unit * xp.astype(root, outputs.dtype, copy=False) for unit in _units(xp, outputs))
        elif mode == "sampled":
            drawn = rng.uniform(size=tuple(outputs.shape))
            below, above = (xp.asarray(each, dtype=z.dtype, device=device(z)) for each in (drawn, 1 - drawn))
            # p is rounded to 1 where 1 - p is not rounded to 0.
            y = xp.where(z >= 0, above > _logistic(xp, -z), below < _logistic(xp, z))
            yield xp.astype(_residual(xp, z, xp.astype(y, z.dtype)), outputs.dtype, copy=False)
        else:
            raise _no_mode("Bernoulli", mode)

    def derivatives(self, outputs: Array, tangents: Array, targets: Array) -> tuple[Array, Array]:
        """Return the sums of (p - y) . v_k and of sum_j p_j (1 - p_j) v_kj v_lj."""
        xp: Any = namespace(outputs=outputs, tangents=tangents)
        z = in_single(outputs)
        rows = in_single(xp.reshape(tangents, (tangents.shape[0], -1)))
        slope = xp.sum(rows * xp.reshape(_residual(xp, z, _alike(z, targets)), (1, -1)), axis=1)
        decayed = xp.exp(-xp.abs(z))
        return slope, _gram(xp, rows, xp.reshape(decayed / xp.square(1 + decayed), (-1,)))


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


def _residual(xp: Any, logits: Array, targets: Array) -> Array:
    """Return p - y, in which nothing cancels where y is 0 or 1."""
    return (1 - targets) * _logistic(xp, logits) - targets * _logistic(xp, -logits)


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
    gram = row_products(weighted, rows)
    return (gram + xp.matrix_transpose(gram)) / 2
