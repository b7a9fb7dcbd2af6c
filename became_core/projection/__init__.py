"""Projection: memories that keep new updates out of the space, or off the weights, that old tasks use."""

from became_core.projection.base import FinishedTask, Projector, Region, View, compact, full
from became_core.projection.gates import GatedRegion
from became_core.projection.gpcns import GPCNS
from became_core.projection.gpm import GPM
from became_core.projection.hat import HAT
from became_core.projection.nscl import NSCL
from became_core.projection.ogd import OGD
from became_core.projection.packnet import PackNet
from became_core.projection.sgp import SGP
from became_core.projection.trgp import TRGP, TrustRegion
from became_core.projection.unit_graph import UnitGraph

__all__ = [
    "GPCNS",
    "GPM",
    "HAT",
    "NSCL",
    "OGD",
    "SGP",
    "TRGP",
    "FinishedTask",
    "GatedRegion",
    "PackNet",
    "Projector",
    "Region",
    "TrustRegion",
    "UnitGraph",
    "View",
    "compact",
    "full",
]
