"""What adapters of users' own models share: what a tap tells of such a layer, and how its weights are turned."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["CANONICAL_AXES", "OwnLayer"]

# From the layouts of flax and Keras, [in, out] and HWIO, to the canonical ones, by the number of axes.
CANONICAL_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


@dataclass(frozen=True)
class OwnLayer:
    """What a tap tells of a layer of a user's own model, ``NAME.weight`` and perhaps ``NAME.bias``."""

    name: str
    kind: Literal["matrix", "scale"]
    bias: bool
