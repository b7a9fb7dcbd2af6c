"""Curvature of the loss, and what projectors need, from layer taps: the inputs and output gradients of each layer.

Taps give diagonal Fisher information, Kronecker factors, per-sample gradients and Gram matrices. The derivatives of the
loss along directions come from forward-mode differentiation.
"""

from became_core.curvature.cross_entropy import (
    Pushforward,
    TapMode,
    derivatives_along,
    log_softmax,
    logit_cotangents,
)
from became_core.curvature.fisher import TAP_MODES, FisherKind, diagonal_fisher
from became_core.curvature.grams import gradient_grams, input_grams
from became_core.curvature.kfac import KroneckerFactors, Sharing, kronecker_factors
from became_core.curvature.taps import Tap, Taps, batch_gradient, per_sample_gradients, per_sample_square_sum

__all__ = [
    "TAP_MODES",
    "FisherKind",
    "KroneckerFactors",
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
    "kronecker_factors",
    "log_softmax",
    "logit_cotangents",
    "per_sample_gradients",
    "per_sample_square_sum",
]
