"""Arrays of which each process, or each device, has a part: what is here of them, and sums over all of them.

A sum over such arrays is the sum over each process's part, and then one reduction of the few numbers that result. So
no process needs another's part. Who computes on parts by hand, as within ``jax.shard_map``, says by ``reduce=`` how
numbers are summed over all of them: ``lambda numbers: jax.lax.psum(numbers, "data")``.

Convention: a part that several processes have counts once.
"""

from collections.abc import Callable, Sequence
from typing import Any

from became_core.arrays.frameworks import shards_among
from became_core.arrays.namespace import Array, framework_for, namespace, on_host

__all__ = ["Reduce", "Shared", "hold", "is_spread", "shared_by_processes"]

# From an array of this process or device to the sum of all processes' or devices' arrays.
Reduce = Callable[[Array], Array]


class Shared:
    """Arrays of one mesh of processes.

    Attributes:
        mesh: the processes, as the framework has them.
    """

    def __init__(self, framework_module: Any, arrays: Sequence[Array]) -> None:
        """Find the mesh."""
        self._module = framework_module
        self.mesh = framework_module.mesh_of(arrays)

    def layout(self, arrays: Sequence[Array]) -> Any:
        """Return how arrays of one shape are cut; its methods are those of ``became_core.arrays.dtensor.Layout``."""
        return self._module.layout(self.mesh, arrays)

    def total(self, numbers: Array) -> Array:
        """Return the sum over all processes."""
        return self._module.total(self.mesh, numbers)


def shared_by_processes(arrays: Sequence[Array]) -> Shared | None:
    """Return what knows the processes that share these arrays; None if this process has each array whole.

    Raises:
        BecameError: if the arrays lie on two meshes.
    """
    module = shards_among(arrays)
    return None if module is None else Shared(module, arrays)


def is_spread(array: Array) -> bool:
    """Whether an array may be spread over several devices by a compiler, and so should keep its shape."""
    framework, module = framework_for("the value", array)
    return framework.spreads(module)


def hold(condition: Callable[[Any, Array], Array], arrays: Sequence[Array]) -> list[bool]:
    """Return for each array whether a condition is true of every element, in all processes: by one reduction for all.

    Args:
        condition: (namespace, array) -> booleans of the array's shape.
        arrays: of one framework; they have values.
    """
    xp, shared = namespace(array=arrays[0]), shared_by_processes(arrays)
    if shared is None:
        return [bool(xp.all(condition(xp, array))) for array in arrays]
    parts = [shared.layout([array]).part(array) for array in arrays]
    failures = xp.stack([1 - xp.astype(xp.all(condition(xp, part)), xp.float32) for part in parts])
    return [not count for count in on_host(shared.total(failures))]
