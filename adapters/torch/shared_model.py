"""A model that several processes train together: wrapped by ``DistributedDataParallel``, or by ``fully_shard`` (FSDP2).

| model | its parameters | how it is measured |
| --- | --- | --- |
| not wrapped | this process's own | as it is |
| compiled | those of the module that was compiled | this module |
| DDP | the same in all processes | the module that is wrapped, so that names have no ``module.`` |
| FSDP2 | distributed tensors | with its parameters whole in every process, for the time of a measurement |

Parameters go by the user's own names: they have no ``_orig_mod``, of the model or of a part of it that is compiled by
itself.

Every process measures its own batches, and sums and counts are added over all processes; they need not have equally
many batches. A sum that belongs to a sharded parameter is sharded as that is, by a reduce-scatter.

Convention: every process must call these functions, as for all that communicates. Processes count from 1 in messages.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from adapters.torch.share import ProcessShare
from became_core import BecameError
from became_core.arrays import Params, named_leaves, with_leaves
from became_core.curvature import Exchange

__all__ = ["SharedModel", "beside", "first_changed", "lengths_of", "own_part"]

T = TypeVar("T")

# What a module that ``torch.compile`` returns calls the one that it was given, as state dicts show.
COMPILED = "_orig_mod"

# The share by which lengths of equal weights may differ on two devices.
MOVED = 1e-12


def own_part(value: Any) -> Tensor:
    """Return what this process has of a tensor: the memory of its shard, or the tensor itself if it has it whole."""
    local: Tensor = value.detach().to_local() if hasattr(value, "to_local") else value
    return local


@torch.no_grad()
def lengths_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the length of each weight, of what this process has of it, by which a change of it is noticed."""
    return {name: torch.linalg.vector_norm(own_part(value), dtype=torch.float64) for name, value in weights.items()}


def first_changed(before: Mapping[str, Tensor], now: Mapping[str, Tensor], names: Iterable[str]) -> str | None:
    """Return the first of these names whose length is another one than before; None if there is none."""
    return next((name for name in names if _differs(before[name].nan_to_num(), now[name].nan_to_num())), None)


def _differs(before: Tensor, now: Tensor) -> bool:
    if before.device == now.device:
        return not torch.equal(before, now)
    return not torch.allclose(before.to(now.device), now, rtol=MOVED, atol=0)  # devices sum in other orders


def beside(tree: T, owners: Mapping[str, Tensor]) -> T:
    """Return a tree, such as a projector, whose tensors are where the parameters are that their paths name."""
    leaves, moved = named_leaves(tree), dict[str, Any]()
    for path, value in leaves.items():
        name = _name_within(path, owners)
        if name is not None and isinstance(value, Tensor):
            moved[path] = value.to(owners[name].device)
    if all(value is leaves[path] for path, value in moved.items()):
        return tree
    result: T = with_leaves(tree, leaves | moved)
    return result


def _name_within(path: str, names: Collection[str]) -> str | None:
    """Return the longest name that is a part of a dotted path; None if there is none."""
    parts = path.split(".")
    within = (parts[first:last] for first in range(len(parts)) for last in range(first + 1, len(parts) + 1))
    return max((name for name in map(".".join, within) if name in names), key=len, default=None)


class _Sums(ProcessShare):
    """Sums over processes of a loop that is not ours; PyTorch says itself, as it does of DDP, that one has ended."""

    def reduce(self, numbers: Tensor) -> Tensor:
        """Sum numbers over all processes, in place."""
        distributed.all_reduce(numbers, group=self.group)
        return numbers


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` was given, if it made this one, which its child's name tells."""
    inner = dict(model.named_children())
    return inner[COMPILED] if list(inner) == [COMPILED] else model


def _own_name(name: str) -> str:
    """Return the name that a parameter or a module has where nothing is compiled."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


class SharedModel:
    """A user's model, and the processes that train it together: this one alone if it is not wrapped.

    Attributes:
        model: the module whose parameters have the user's own names.
        count: how many processes there are.
        rank: the number of this process, from 0.
        group: the processes; None for all, and if there is one.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find out how the model is wrapped.

        Raises:
            BecameError: if it is wrapped in a way that cannot be measured.
        """
        self.model, self.count, self.rank = _uncompiled(model), 1, 0
        self.group: Any = None
        self._sharded: list[Any] = []  # the modules that fully_shard was called on
        self._syncs_buffers = self._is_whole = False
        # Without a process group nothing is wrapped, and these modules need not be imported.
        if not distributed.is_available() or not distributed.is_initialized():
            return
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        for name, module in model.named_modules():
            if isinstance(module, FullyShardedDataParallel):
                raise BecameError("the model is wrapped by FullyShardedDataParallel; wrap it by fully_shard instead.")
            is_wrapper = isinstance(module, nn.parallel.DistributedDataParallel)
            if (is_wrapper and name) or (isinstance(module, FSDPModule) and COMPILED in name.split(".")):
                raise BecameError(
                    f"the model has its wrapper for several processes inside, at '{name}'; give the wrapped model "
                    "itself, and compile what it wraps."
                )
        is_copied = isinstance(model, nn.parallel.DistributedDataParallel)
        if is_copied:
            wrapped: Any = model.module
            self.model, self.group = _uncompiled(wrapped), model.process_group
            self._syncs_buffers = bool(model.broadcast_buffers)
        elif isinstance(model, FSDPModule):
            self.model = model
        self._sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        if self._sharded and is_copied:
            raise BecameError(
                "the model is sharded within DistributedDataParallel; give fully_shard a mesh of two axes."
            )
        meshes = self._check_placements()
        if not self._sharded and not is_copied:
            return
        if self._sharded and meshes and meshes[0].ndim == 1:
            self.group = meshes[0].get_group()
        self.count = distributed.get_world_size(self.group)
        self.rank = distributed.get_rank(self.group)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters."""
        return {_own_name(name): value for name, value in self.model.named_parameters()}

    @property
    def raw_names(self) -> dict[str, str]:
        """What the model itself calls each parameter."""
        return {_own_name(name): name for name, _ in self.model.named_parameters()}

    @property
    def names(self) -> dict[nn.Module, str]:
        """All modules and their names."""
        return {module: _own_name(name) for name, module in self.model.named_modules()}

    def _check_placements(self) -> list[Any]:
        """Return the mesh of the distributed parameters, if there are any.

        Raises:
            BecameError: if they are distributed otherwise than by ``fully_shard`` alone.
        """
        self.shard()
        meshes: list[Any] = []
        parameters: dict[str, Any] = dict(self.parameters)
        for name, value in parameters.items():
            placements = getattr(value, "placements", ())
            if placements and (not self._sharded or sum(not each.is_replicate() for each in placements) > 1):
                raise BecameError(
                    f"the parameter '{name}' is distributed as {placements}; only fully_shard may distribute "
                    "parameters, each along one axis."
                )
            meshes += [value.device_mesh] if placements and value.device_mesh not in meshes else []
        if len(meshes) > 1 or (meshes and meshes[0].ndim > 1 and meshes[0].size() < distributed.get_world_size()):
            raise BecameError("the parameters lie on several meshes of processes; give fully_shard one mesh of all.")
        return meshes

    # Where the parameters are.

    def shard(self) -> None:
        """Let the model's parameters be the sharded ones, which FSDP2 leaves whole after a pass without gradients."""
        if not self._is_whole:
            for module in self._sharded:
                module.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let every process have all parameters whole and passes communicate nothing, for the time of this context.

        Afterwards modules within the outermost sharded one free their parameters after a forward pass, and it does not,
        which is what ``fully_shard`` does if it is not told otherwise.

        Raises:
            BecameError: if FSDP2 computes in another dtype than it stores.
        """
        if self._syncs_buffers:  # as DDP does before each of its own forward passes
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, group_src=0, group=self.group)
        if not self._sharded:
            yield
            return
        self.shard()
        stored = {name: value.dtype for name, value in self.parameters.items()}
        try:
            for module in self._sharded:
                module.set_reshard_after_forward(False, recurse=False)
                module.set_reshard_after_backward(False, recurse=False)
                module.unshard()
            self._is_whole = True
            for name, value in self.parameters.items():
                if value.dtype != stored[name]:
                    raise BecameError(
                        f"fully_shard computes with '{name}' as {value.dtype} and stores it as {stored[name]}; leave "
                        "out param_dtype of its MixedPrecisionPolicy, and use torch.autocast."
                    )
            yield
        finally:
            self._is_whole = False
            inner = {part for module in self._sharded for part in module.modules() if part is not module}
            for module in self._sharded:
                module.set_reshard_after_forward(module in inner, recurse=False)
                module.set_reshard_after_backward(True, recurse=False)
                module.reshard()

    @staticmethod
    def gathered(values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return values whole: those of distributed tensors by an all-gather each."""
        return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in values.items()}

    @staticmethod
    def placed(value: Tensor, like: Any) -> Tensor:
        """Return a tensor that every process has whole as a parameter is: on its device, and sharded as it is."""
        value = value.to(like.device)
        if not hasattr(like, "placements") or hasattr(value, "placements"):
            return value
        from torch.distributed.tensor import distribute_tensor

        # Without a source rank nothing is sent.
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    # Sums over all processes.

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over all processes of an array that each has, in its dtype and where it is."""
        if self.count == 1:
            return numbers
        result = numbers.to(next(self.model.parameters()).device).contiguous().clone()
        distributed.all_reduce(result, group=self.group)
        return result.to(numbers.device)

    @property
    def exchange(self) -> Exchange:
        """How the processes bring together what their layers read."""
        share = _Sums(self.rank, self.count, group=self.group)
        return Exchange(share.total, share.joined)

    def total_like(self, sums: Params, parameters: Mapping[str, Any]) -> Params:
        """Return sums over all processes, each placed as the parameter of its name."""
        result: Params = {}
        for name, value in sums.items():
            like = parameters[name]
            if not hasattr(like, "placements"):
                result[name] = self.total(value)
                continue
            from torch.distributed.tensor import DTensor, Partial

            mesh = like.device_mesh
            partial = DTensor.from_local(value, mesh, [Partial()] * mesh.ndim, run_check=False)
            result[name] = partial.redistribute(mesh, like.placements)
        return result

    def of_all(self, value: Any) -> list[Any]:
        """Return what each process gives, a small object that can be pickled, in the order of the processes."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values
