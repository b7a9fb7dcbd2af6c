"""PyTorch's distributed tensors: what a process has of them, and sums over all processes.

A ``DTensor`` lies on a mesh of processes. For each dimension of the mesh it is sharded (each process has some rows of
an axis, and not all need have equally many), replicated (each has all), or partial (it is the sum of what they have).

Convention: this module is imported where such a tensor exists, and nowhere else. Every process of the mesh must call
these functions, as for all that communicates. Only ``total`` communicates, unless tensors side by side are sharded
differently or one is partial: these are then distributed anew, a collective for each.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from became_core.arrays.namespace import Array
from became_core.errors import BecameError

# Not import statements: the core imports no framework, and only distributed tensors ask for this module.
torch: Any = importlib.import_module("torch")
distributed: Any = importlib.import_module("torch.distributed.tensor")
DTensor, Partial, Replicate, Shard = distributed.DTensor, distributed.Partial, distributed.Replicate, distributed.Shard

__all__ = ["Layout", "layout", "mesh_of", "total"]


def mesh_of(arrays: Sequence[Any]) -> Any:
    """Return the mesh of those arrays that are distributed, of which there is at least one.

    Raises:
        BecameError: if there are two meshes.
    """
    meshes = list(dict.fromkeys(array.device_mesh for array in arrays if isinstance(array, DTensor)))
    if len(meshes) > 1:
        raise BecameError(
            f"the arrays are distributed over two meshes of processes, {meshes[0]} and {meshes[1]}; distribute all "
            "over one."
        )
    return meshes[0]


@dataclass(frozen=True)
class Layout:
    """How arrays side by side are cut among processes, all of them alike.

    Attributes:
        mesh: the processes.
        placements: for each dimension of the mesh, ``Shard`` or ``Replicate``.
    """

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def counts(self) -> bool:
        """Whether this process is the one, of those that have the same part, that counts it in a sum."""
        coordinate = self.mesh.get_coordinate() or [0] * len(self.placements)
        return not any(
            isinstance(placement, Replicate) and position
            for placement, position in zip(self.placements, coordinate, strict=True)
        )

    def part(self, array: Array) -> Array:
        """Return what this process has of an array; one that is not distributed is the same in all processes."""
        if not isinstance(array, DTensor):
            array = DTensor.from_local(array, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        if array.placements != self.placements:
            array = array.redistribute(self.mesh, self.placements)
        return array.to_local()

    def share(self, array: Array) -> Array:
        """Return what this process adds to a sum: its part, or zeros if another process counts that part."""
        part = self.part(array)
        return part if self.counts else torch.zeros_like(part)

    def embedded(self, array: Array) -> Array:
        """Return this process's share of an array within zeros of the whole array's shape.

        The sum over all processes is the array.

        Raises:
            BecameError: if the array is cut in another way than into consecutive rows.
        """
        share = self.share(array)
        starts, sizes = [0] * len(array.shape), list(array.shape)
        for dimension, placement in enumerate(self.placements):
            if not isinstance(placement, Shard):
                continue
            axis, length = placement.dim, sizes[placement.dim]
            rows = -(-length // self.mesh.size(dimension))  # as torch.chunk has it: the last processes have fewer
            first = min(self.mesh.get_local_rank(dimension) * rows, length)
            starts[axis], sizes[axis] = starts[axis] + first, min(rows, length - first)
        if list(share.shape) != sizes:
            raise BecameError(
                f"an array of shape {tuple(array.shape)} is cut in a way that is not known, {self.placements}; shard "
                "it by consecutive rows."
            )
        whole = torch.zeros(tuple(array.shape), dtype=share.dtype, device=share.device)
        whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))] = share
        return whole


def layout(mesh: Any, arrays: Sequence[Any]) -> Layout:
    """Return how arrays side by side are cut: as the first of them that is sharded, or not at all."""
    for array in arrays:
        if isinstance(array, DTensor) and any(isinstance(placement, Shard) for placement in array.placements):
            return Layout(mesh, tuple(Replicate() if each.is_partial() else each for each in array.placements))
    return Layout(mesh, (Replicate(),) * mesh.ndim)


def total(mesh: Any, values: Array) -> Array:
    """Return the sum over all processes of an array that each has, in every process: one all-reduce a mesh dimension.

    It has derivatives, as the operations of distributed tensors have.
    """
    partial = DTensor.from_local(values, mesh, [Partial()] * mesh.ndim, run_check=False)
    return partial.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()
