"""Curvature from layer taps: diagonal Fisher information, and derivatives along a direction."""

from became_core.curvature.directional import Pushforward, derivatives_along, log_softmax
from became_core.curvature.fisher import FisherKind, diagonal_fisher
from became_core.curvature.taps import Tap, Taps

__all__ = ["FisherKind", "Pushforward", "Tap", "Taps", "derivatives_along", "diagonal_fisher", "log_softmax"]
