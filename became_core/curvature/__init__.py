"""What layer taps give: diagonal Fisher information, Kronecker factors, per-sample gradients, Gram matrices.

And, by forward mode, derivatives of the loss along directions.
"""

from became_core.curvature.cotangents import TapMode, logit_cotangents
from became_core.curvature.directional import Pushforward, derivatives_along, log_softmax
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
