"""The memory of ``Continual`` in a folder: each process writes and reads its part, by ``torch.distributed.checkpoint``.

| in the folder | |
| --- | --- |
| ``became.json`` | the metadata of a memory's file, the arrays' dtypes and shapes, and the shards' names and sizes |
| ``shards-.../`` | safetensors files, each written by one process; what all processes have alike is in one of them |

Nothing is gathered, and nothing is unpickled. ``became.json`` is written last and replaces the old one at once, so that
a save that is killed leaves the memory that was saved before.

Convention: every process must call these functions. Processes count from 1 in messages.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from adapters.backend.memory_file import check_description, understood
from adapters.runs.files import DamagedError, read_sealed, write_sealed
from adapters.torch.shared_model import SharedModel, own_part
from became_core import BecameError
from became_core.errors import first_line

__all__ = ["all_agree", "read_shards", "write_shards"]

MANIFEST, SHARDS = "became.json", "shards-"


def write_shards(folder: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str], shared: SharedModel) -> None:
    """Write a memory into a folder, which may have one already.

    Args:
        folder: on a disk that all processes see.
        arrays: of ``memory_arrays``; of distributed tensors each process writes its shards.
        metadata: of ``described``.
        shared: the model.

    Raises:
        BecameError: in all processes, if one of them cannot write, or does not see the folder, or if PyTorch is older
            than its storage of safetensors.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = _safetensors_storage().HuggingFaceStorageWriter
    beside = folder / (SHARDS + shared.of_all(uuid4().hex)[0])
    try:
        _in_first(shared, folder, beside.mkdir, parents=True)
        unseen = f"process {shared.rank + 1} does not see {beside}; give a folder on a disk that all processes share."
        all_agree(shared, None if beside.is_dir() else unseen)
        state = {name: _contiguous(value) for name, value in arrays.items()}
        with _one_sentence(f"could not write {folder}"), _alone(shared) as where:
            save(state, storage_writer=writer(str(beside), save_distributed=True), **where)
        seen = {path.name: path.stat().st_size for path in beside.iterdir()}  # at least those of this process
        files = {name: size for of_one in shared.of_all(seen) for name, size in of_one.items()}
    except BaseException:
        if shared.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    manifest = {
        "memory": json.loads(metadata["became"]),
        "arrays": {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in state.items()},
        "shards": beside.name,
        "files": files,
    }
    _in_first(shared, folder, _replace_manifest, folder, manifest)


def read_shards(
    folder: Path, parameters: Mapping[str, Any], shared: SharedModel
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a folder says of a memory, and its arrays, where the parameters that they belong to are.

    Args:
        folder: of ``write_shards``, by any number of processes.
        parameters: of the model, by name; means and Fisher information are sharded as these are.
        shared: the model.

    Raises:
        BecameError: in all processes, if the folder is no memory, is damaged, or is one of another architecture, or if
            PyTorch is older than its storage of safetensors.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = _safetensors_storage().HuggingFaceStorageReader
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    state, problem, here = dict[str, Any](), None, f"process {shared.rank + 1}"
    try:
        if not folder.is_dir():
            raise BecameError(f"{here} does not see {folder}; give a folder on a disk that all processes share.")
        with understood(folder):
            manifest = _manifest(folder)
            check_description(folder, manifest["memory"], shapes, may_have_grown=True)
            for key, (dtype, shape) in manifest["arrays"].items():
                part, _, name = key.partition(".")
                own = part == "projector"
                like = parameters.get(name.partition(".")[2] if own else name)
                state[key] = _empty(shape, getattr(torch, dtype), like, whole=own)
    except BecameError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{here} could not read {folder}: {error.strerror}."
    all_agree(shared, problem)
    with _one_sentence(f"could not read {folder}"), _alone(shared) as where:
        load(state, storage_reader=reader(str(folder / manifest["shards"])), **where)
    return manifest["memory"], state


def _safetensors_storage() -> Any:
    """Return PyTorch's module for safetensors files that several processes write and read."""
    try:
        from torch.distributed.checkpoint import hf_storage
    except ImportError:
        raise BecameError(
            f"PyTorch {torch.__version__} cannot write or read a memory in shards; install PyTorch 2.8 or newer, or "
            "save it without sharded=True."
        ) from None
    return hf_storage


def _manifest(folder: Path) -> dict[str, Any]:
    """Return what a folder says of its memory, all of whose files are there.

    Raises:
        BecameError: if it says nothing, or a file is missing or has another size.
    """
    if not (folder / MANIFEST).is_file():
        raise BecameError(f"{folder} is no memory that Continual.save wrote: it has no {MANIFEST}.")
    try:
        manifest = read_sealed(folder / MANIFEST)
    except DamagedError as error:
        raise BecameError(f"{error}; save the memory again.") from None
    for name, size in manifest["files"].items():
        path = folder / manifest["shards"] / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            is_what = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise BecameError(f"{path} {is_what}; save the memory again.")
    return manifest


def _replace_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Let a folder have the memory of a manifest, and remove the shards of others."""
    write_sealed(folder / MANIFEST, manifest)
    for shards in folder.glob(f"{SHARDS}*"):
        if shards.name != manifest["shards"]:
            shutil.rmtree(shards, ignore_errors=True)


def _contiguous(value: Tensor) -> Tensor:
    """Return a tensor whose part in this process lies in one run, which safetensors needs."""
    return value if own_part(value).is_contiguous() else value.clone(memory_format=torch.contiguous_format)


def _empty(shape: Any, dtype: torch.dtype, like: Any, *, whole: bool) -> Tensor:
    """Return an array to read into, where a parameter is, and sharded as it is unless it is to be whole."""
    if whole or not hasattr(like, "placements"):
        return torch.empty(shape, dtype=dtype, device=None if like is None else like.device)
    from torch.distributed.tensor import empty

    return empty(*shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


# What all processes do or raise together.


def _in_first(shared: SharedModel, folder: Path, action: Any, *arguments: Any, **options: Any) -> None:
    """Let the first process act on the disk, and raise a BecameError in all of them if it cannot."""
    failure = None
    if shared.rank == 0:
        try:
            action(*arguments, **options)
        except OSError as error:
            failure = f"process 1 could not write {folder}: {error.strerror}."
        except BecameError as error:
            failure = str(error)
    all_agree(shared, failure)


def all_agree(shared: SharedModel, problem: str | None) -> None:
    """Raise a BecameError in all processes if one of them has a problem, which a sentence says."""
    problems = [each for each in shared.of_all(problem) if each is not None]
    if problems:
        raise BecameError(problems[0])


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Say what PyTorch raises in all processes, with the traceback of each, in one sentence."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise BecameError(f"process {rank + 1} {what}: {first_line(cause)}.") from error


@contextmanager
def _alone(shared: SharedModel) -> Iterator[dict[str, Any]]:
    """Yield the arguments by which PyTorch knows who takes part; that one process is alone, it need not warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield {"no_dist": True} if shared.count == 1 else {"process_group": shared.group}
