"""Precision matrices by structure and the Gaussian posterior, each from its definition.

Convention: float64. Parameters are flat vectors [d] and precisions are dense matrices [d, d]. A log-likelihood is the
sum over all samples.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "block_diagonal",
    "evidence_slope",
    "kronecker_matrix",
    "log_gaussian",
    "low_rank_matrix",
    "regression_evidence",
    "regression_posterior",
]

Array = NDArray[np.float64]


def kronecker_matrix(a: Array, g: Array, damping: float) -> Array:
    """Return P[(o, i), (p, j)] = G[o, p] A[i, j] + damping on the diagonal, for a weight [d_out, d_in], row by row."""
    d_out, d_in = len(g), len(a)
    matrix = np.zeros((d_out * d_in, d_out * d_in))
    for o in range(d_out):
        for i in range(d_in):
            for p in range(d_out):
                for j in range(d_in):
                    matrix[o * d_in + i, p * d_in + j] = g[o, p] * a[i, j]
    return matrix + damping * np.eye(d_out * d_in)


def low_rank_matrix(factor: Array, scales: Array, diagonal: Array) -> Array:
    """Return the sum over the factor's columns u of s u u^T, plus the diagonal; the factor is [d, r]."""
    matrix = np.diag(diagonal)
    for scale, column in zip(scales, factor.T, strict=True):
        matrix = matrix + scale * np.outer(column, column)
    return matrix


def block_diagonal(*blocks: Array) -> Array:
    """Return the matrix that has these blocks on its diagonal, in their order, and zeros elsewhere."""
    total = np.zeros((sum(map(len, blocks)), sum(map(len, blocks))))
    start = 0
    for block in blocks:
        stop = start + len(block)
        total[start:stop, start:stop] = block
        start = stop
    return total


def log_gaussian(x: Array, mean: Array, covariance: Array) -> float:
    """Return log N(x; mean, covariance)."""
    offset = x - mean
    distance = offset @ np.linalg.inv(covariance) @ offset
    return float(-0.5 * (distance + np.log(np.linalg.det(2 * np.pi * covariance))))


def regression_posterior(
    x: Array, y: Array, noise_precision: float, mean: Array, precision: Array
) -> tuple[Array, Array]:
    """Return the posterior mean and precision of w in y = x w + noise (Bishop 2006, equations 3.50 and 3.51).

    Args:
        x: inputs, [samples, d].
        y: targets, [samples].
        noise_precision: beta, the precision of each target's Gaussian noise.
        mean: the mean of the prior, [d].
        precision: the precision of the prior, [d, d].
    """
    total = precision + noise_precision * x.T @ x
    return np.linalg.inv(total) @ (precision @ mean + noise_precision * x.T @ y), total


def regression_evidence(x: Array, y: Array, noise_precision: float, mean: Array, precision: Array) -> float:
    """Return log p(y | x), where y is Gaussian with mean x m and covariance x P^-1 x^T + I / beta."""
    return log_gaussian(y, x @ mean, x @ np.linalg.inv(precision) @ x.T + np.eye(len(y)) / noise_precision)


def evidence_slope(rho: float, precision: Array, curvature: Array, offset: Array) -> float:
    """Return the derivative by log rho of log N(offset; 0, H^-1 + (rho P)^-1), the evidence of a scale rho of a prior.

    The covariance S has the derivative -(rho P)^-1, and the density's logarithm is -(log det S + o.S^-1.o) / 2.

    Args:
        rho: the scale of the prior's precision.
        precision: P, of the prior at rho = 1, [d, d].
        curvature: H, of a quadratic log-likelihood, [d, d].
        offset: o, from the prior's mean to the maximum of the likelihood, [d].
    """
    prior = np.linalg.inv(rho * precision)
    inverse = np.linalg.inv(np.linalg.inv(curvature) + prior)
    return float(0.5 * np.trace(inverse @ prior) - 0.5 * offset @ inverse @ prior @ inverse @ offset)
