"""How devices share batches: samples are cut along a mesh's axis "data", and all else is whole on each device.

XLA does the rest: what is computed of samples that are cut is cut as well, and sums over samples are summed over
devices. In each function a mesh may be None, for one device, and then nothing is done.

Several devices that JAX makes of one processor share a pool of threads, and each keeps two of them while it waits for
the others' part of a sum. (Of four devices, some waited for ever with six threads, and none with seven.) Once no thread
is free, nothing goes on. So the pool needs two threads for each device, and more to compute with.
"""

import os
import re
import warnings
from typing import TypeVar

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapters.backend import available_threads
from became_core.arrays import Array

__all__ = [
    "THREADS",
    "is_explicit",
    "pool_threads",
    "shared",
    "waiting_threads",
    "warn_of_size",
    "warn_of_threads",
    "whole",
    "with_automatic_axes",
]

T = TypeVar("T")

# The variables of the environment that say how many threads XLA's pool has: what newer and what older versions read.
THREADS = "PJRT_NPROC", "NPROC"
# How many threads of the pool a device of the processor keeps while it waits for others.
THREADS_OF_DEVICE = 2


def is_explicit(mesh: Mesh) -> bool:
    """Whether shardings along an axis of a mesh are parts of types, as along those that ``jax.make_mesh`` makes."""
    return any(kind.name != "Auto" for kind in mesh.axis_types or ())


def with_automatic_axes(mesh: Mesh) -> Mesh:
    """Return a mesh of the same devices and axes, along all of which XLA chooses how arrays are cut."""
    return Mesh(mesh.devices, mesh.axis_names)


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


def waiting_threads() -> int:
    """Return how many threads may wait for sums, if JAX is told to make several devices of the processor; 0 if not.

    JAX is not asked for its devices, since it would make them.
    """
    flag = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = max(int(jax.config.jax_num_cpu_devices), int(flag[1]) if flag else 0)
    return THREADS_OF_DEVICE * devices if devices > 1 else 0


def pool_threads() -> int:
    """Return how many threads XLA's pool has, if JAX has not made more devices of the processor."""
    said = (os.environ.get(name, "") for name in THREADS)
    return next((int(number) for number in said if number.isdecimal()), available_threads())


def warn_of_threads(mesh: Mesh) -> None:
    """Warn if the devices of a mesh may wait for ever, because they are of one processor and have too few threads."""
    devices = sum(device.platform == "cpu" for device in mesh.local_devices)
    if devices > 1 and pool_threads() <= THREADS_OF_DEVICE * devices:
        warnings.warn(
            f"{devices} devices of one processor share {max(devices, pool_threads())} threads, and may wait for each "
            f"other for ever; set {THREADS[0]} to {THREADS_OF_DEVICE * devices + 1} or more before JAX is first asked "
            "for its devices.",
            stacklevel=3,
        )
