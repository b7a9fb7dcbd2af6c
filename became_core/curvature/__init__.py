"""What layer taps give: diagonal Fisher information, derivatives along directions, Gram matrices for projectors."""

from became_core.curvature.directional import Pushforward, derivatives_along, log_softmax
from became_core.curvature.fisher import FisherKind, diagonal_fisher
from became_core.curvature.grams import gradient_grams, input_grams
from became_core.curvature.taps import Tap, Taps

__all__ = [
    "FisherKind",
    "Pushforward",
    "Tap",
    "Taps",
    "derivatives_along",
    "diagonal_fisher",
    "gradient_grams",
    "input_grams",
    "log_softmax",
]
