"""How devices share batches: samples are cut along a mesh's axis "data", and all else is whole on each device.

XLA does the rest: what is computed of samples that are cut is cut as well, and sums over samples are summed over
devices. In each function a mesh may be None, for one device, and then nothing is done.
"""

import warnings
from typing import TypeVar

from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from became_core.arrays import Array

__all__ = ["shared", "warn_of_size", "whole"]

T = TypeVar("T")


def shared(samples: Array, mesh: Mesh | None) -> Array:
    """Return arrays of samples [samples, ...] cut among the devices, or whole if their number does not divide.

    JAX would pad other numbers, but a compiled function cannot return what is padded, such as taps.
    """
    if mesh is None or samples.shape[0] % mesh.shape["data"]:
        return samples
    return lax.with_sharding_constraint(samples, NamedSharding(mesh, PartitionSpec("data")))


def whole(arrays: T, mesh: Mesh | None) -> T:
    """Return arrays that every device has whole."""
    if mesh is None:
        return arrays
    result: T = lax.with_sharding_constraint(arrays, NamedSharding(mesh, PartitionSpec()))
    return result


def warn_of_size(size: int, mesh: Mesh | None) -> None:
    """Warn if devices cannot share batches of a size."""
    if mesh is not None and size % mesh.shape["data"]:
        devices = mesh.shape["data"]
        warnings.warn(
            f"{devices} devices cannot share batches of {size} samples, so each computes them whole; choose a batch "
            f"size that {devices} divides.",
            stacklevel=3,
        )
