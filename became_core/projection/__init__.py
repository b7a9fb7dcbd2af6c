"""Projection: memories that keep new updates out of the space, or off the weights, that old tasks use."""

from became_core.projection.base import Projector, Region, Statistics, View, compact, full
from became_core.projection.gates import GatedRegion
from became_core.projection.gpcns import GPCNS
from became_core.projection.gpm import GPM
from became_core.projection.hat import HAT
from became_core.projection.nscl import NSCL
from became_core.projection.ogd import OGD
from became_core.projection.packnet import PackNet
from became_core.projection.sgp import SGP
from became_core.projection.trgp import TRGP, TrustRegion
from became_core.projection.wiring import Wiring

__all__ = [
    "GPCNS",
    "GPM",
    "HAT",
    "NSCL",
    "OGD",
    "SGP",
    "TRGP",
    "GatedRegion",
    "PackNet",
    "Projector",
    "Region",
    "Statistics",
    "TrustRegion",
    "View",
    "Wiring",
    "compact",
    "full",
]
