"""Projectors: memories of old tasks that keep updates away from what those tasks use.

GPM, SGP, GPCNS, NSCL, OGD and TRGP protect spaces of inputs or gradients; HAT and PackNet protect single weights;
InfLoRA and O-LoRA choose the spaces of low-rank adapters. There is one file for each paper. To add a projector, write
its file and add one line to ``PROJECTORS``.
"""

from became_core.projection.base import FinishedTask, Projector, Region, TaskStart, View, compact, full
from became_core.projection.gates import GatedRegion
from became_core.projection.gpcns import GPCNS
from became_core.projection.gpm import GPM
from became_core.projection.hat import HAT
from became_core.projection.inflora import InfLoRA
from became_core.projection.low_rank import LowRankRegion
from became_core.projection.nscl import NSCL
from became_core.projection.ogd import OGD
from became_core.projection.olora import OLoRA
from became_core.projection.packnet import PackNet
from became_core.projection.sample_gradients import Products
from became_core.projection.sgp import SGP
from became_core.projection.trgp import TRGP, TrustRegion
from became_core.projection.unit_graph import UnitGraph
from became_core.registry import Registry

__all__ = [
    "GPCNS",
    "GPM",
    "HAT",
    "NSCL",
    "OGD",
    "PROJECTORS",
    "SGP",
    "TRGP",
    "FinishedTask",
    "GatedRegion",
    "InfLoRA",
    "LowRankRegion",
    "OLoRA",
    "PackNet",
    "Products",
    "Projector",
    "Region",
    "TaskStart",
    "TrustRegion",
    "UnitGraph",
    "View",
    "compact",
    "full",
]

PROJECTORS: Registry[Projector] = Registry(
    "became.projectors",
    "projector",
    {
        "gpm": GPM,
        "sgp": SGP,
        "gpcns": GPCNS,
        "nscl": NSCL,
        "ogd": OGD,
        "trgp": TRGP,
        "hat": HAT,
        "packnet": PackNet,
        "inflora": InfLoRA,
        "olora": OLoRA,
    },
)
