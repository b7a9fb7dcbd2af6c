"""Gradient projection: memories that keep new updates out of the space that old tasks use."""

from became_core.projection.base import Projector
from became_core.projection.gpm import GPM

__all__ = ["GPM", "Projector"]
