"""The negative evidence lower bound of a variational autoencoder, as a likelihood (Kingma & Welling, ICLR 2014).

A network encodes a sample as a normal distribution of d latent numbers with means m and log variances v, draws from it,
and decodes the draw to the logits z of P pixels. Its outputs are z, m and v in a row, and with the targets y the loss
of a sample is

    sum_j log(1 + e^z_j) - y_j z_j   +   1/2 sum_k m_k^2 + e^v_k - 1 - v_k

the negative log-likelihood of the pixels, given the draw, plus the divergence of the encoding from the standard normal
prior. Both are convex in the outputs, so that the curvature by the outputs is diagonal and not negative: p (1 - p) for
a pixel, 1 for a mean, e^v / 2 for a log variance. With it a merge has the generalised Gauss-Newton matrix of the bound,
exactly along directions. The draw's noise is the sample's own, as every other input is.

Convention: as in ``base.py``; nats a sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from became_core.arrays import Array, device, in_single, namespace, row_products
from became_core.curvature.base import Likelihood, TapMode
from became_core.curvature.likelihoods import Bernoulli
from became_core.errors import BecameError

__all__ = ["ELBO"]


@dataclass(frozen=True)
class ELBO(Likelihood):
    """The negative evidence lower bound, of outputs [N, P + 2 d] and targets [N, P] between 0 and 1.

    Examples:
        >>> outputs = np.array([[0.0, 1.0, 0.0]])  # a pixel's logit, a mean and a log variance
        >>> float(ELBO().loss(outputs, np.array([[1.0]])).round(4))  # log 2 + 1/2
        1.1931
    """

    is_standardised: ClassVar[bool] = False

    def units(self, outputs: Array, targets: Array) -> float:
        """Return the number of samples."""
        return float(outputs.shape[0])

    def loss(self, outputs: Array, targets: Array) -> Array:
        """Return the sum of the negative bounds."""
        logits, mean, log_variance = _parts(in_single(outputs), targets)
        xp = namespace(outputs=outputs)
        divergence = 0.5 * xp.sum(mean * mean + xp.exp(log_variance) - 1 - log_variance)
        return Bernoulli().loss(logits, targets) + divergence

    def cotangents(self, outputs: Array, targets: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
        """Yield (p - y, m, (e^v - 1) / 2); or the root of the curvature for each output, or times noise for all."""
        xp: Any = namespace(outputs=outputs)
        for gradient in self._in_single(in_single(outputs), targets, mode, rng):
            yield xp.astype(gradient, outputs.dtype, copy=False)

    def _in_single(self, outputs: Array, targets: Array, mode: TapMode, rng: np.random.Generator) -> Iterator[Array]:
        """Yield the same in at least float32, as the outputs are."""
        logits, mean, log_variance = _parts(outputs, targets)
        xp: Any = namespace(outputs=outputs)
        root = xp.concat([xp.ones_like(mean), xp.exp(log_variance / 2) * 0.5**0.5], axis=1)
        of_pixels = Bernoulli().cotangents(logits, targets, mode, rng)
        if mode == "empirical":
            yield xp.concat([next(of_pixels), mean, 0.5 * (xp.exp(log_variance) - 1)], axis=1)
        elif mode == "sampled":
            noise = xp.asarray(rng.standard_normal(tuple(root.shape)), dtype=root.dtype, device=device(root))
            yield xp.concat([next(of_pixels), root * noise], axis=1)
        else:
            for of_pixel in of_pixels:  # none is left of a mode that there is not
                yield xp.concat([of_pixel, xp.zeros_like(root)], axis=1)
            places = xp.arange(root.shape[1], device=device(root))
            for place in range(root.shape[1]):
                alone = xp.where(places == place, root, xp.zeros_like(root))
                yield xp.concat([xp.zeros_like(logits), alone], axis=1)

    def derivatives(self, outputs: Array, tangents: Array, targets: Array) -> tuple[Array, Array]:
        """Return the sums of g . v_k and of v_k . H v_l, H being the diagonal above."""
        logits, mean, log_variance = _parts(in_single(outputs), targets)
        xp: Any = namespace(outputs=outputs)
        pixels, tangents = logits.shape[1], in_single(tangents)
        slope, curvature = Bernoulli().derivatives(logits, tangents[:, :, :pixels], targets)
        variance = xp.exp(log_variance)
        gradient = xp.reshape(xp.concat([mean, 0.5 * (variance - 1)], axis=1), (1, -1))
        stiffness = xp.reshape(xp.concat([xp.ones_like(mean), 0.5 * variance], axis=1), (1, -1))
        along = xp.reshape(tangents[:, :, pixels:], (tangents.shape[0], -1))
        gram = row_products(along * stiffness, along)
        return slope + xp.sum(along * gradient, axis=1), curvature + (gram + xp.matrix_transpose(gram)) / 2


def _parts(outputs: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Return the pixels' logits, the means and the log variances."""
    pixels = int(targets.shape[1])
    width = int(outputs.shape[1]) - pixels
    if width < 2 or width % 2:
        raise BecameError(
            f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; the bound needs a logit "
            "for each target, and as many means as log variances after them."
        )
    middle = pixels + width // 2
    return outputs[:, :pixels], outputs[:, pixels:middle], outputs[:, middle:]
