"""Curvature of the loss, and what projectors need, from layer taps: the inputs and output gradients of each layer.

Taps give diagonal Fisher information, Kronecker factors, per-sample gradients and Gram matrices. The derivatives of the
loss along directions come from forward-mode differentiation.
"""

from became_core.curvature.base import Likelihood, Pushforward, TapMode
from became_core.curvature.categorical import Categorical, log_softmax, logit_cotangents
from became_core.curvature.elbo import ELBO
from became_core.curvature.exchange import Exchange
from became_core.curvature.fisher import TAP_MODES, FisherKind, FisherTargets, diagonal_fisher, square_sums
from became_core.curvature.grams import GramSums, gradient_grams, input_grams
from became_core.curvature.kfac import KroneckerFactors, Sharing, kronecker_factors
from became_core.curvature.likelihoods import LIKELIHOODS, Bernoulli, Gaussian, derivatives_along, likelihood_named
from became_core.curvature.taps import (
    Tap,
    Taps,
    batch_gradient,
    inputs_of_uses,
    joined_uses,
    per_sample_factors,
    per_sample_gradients,
    per_sample_square_sum,
)

__all__ = [
    "ELBO",
    "LIKELIHOODS",
    "TAP_MODES",
    "Bernoulli",
    "Categorical",
    "Exchange",
    "FisherKind",
    "FisherTargets",
    "Gaussian",
    "GramSums",
    "KroneckerFactors",
    "Likelihood",
    "Pushforward",
    "Sharing",
    "Tap",
    "TapMode",
    "Taps",
    "batch_gradient",
    "derivatives_along",
    "diagonal_fisher",
    "gradient_grams",
    "input_grams",
    "inputs_of_uses",
    "joined_uses",
    "kronecker_factors",
    "likelihood_named",
    "log_softmax",
    "logit_cotangents",
    "per_sample_factors",
    "per_sample_gradients",
    "per_sample_square_sum",
    "square_sums",
]
