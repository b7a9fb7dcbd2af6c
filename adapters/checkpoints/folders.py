"""Checkpoints: what a file or a folder of a model holds, in whichever format it was saved.

Formats: a safetensors file; a folder of shards with their index; a folder of a Hugging Face model; a PyTorch file,
which PyTorch reads with ``weights_only=True`` and in no other way; a NumPy archive; a folder of a LoRA adapter. Nothing
is executed and nothing is unpickled. A link that leads out of its folder is refused, except the links of the Hugging
Face cache into the cache's own ``blobs``.

Convention: names of tensors are the files' own; a checkpoint's tensors are in the order of its files.
"""

import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.companions import beside
from adapters.checkpoints.npz import numpy_word, read_npz
from adapters.checkpoints.plan import path_of
from adapters.checkpoints.resources import allow_files
from adapters.checkpoints.tensors import StoredTensor, parse_json, read_safetensors
from adapters.runs.files import check_is_file, read_file
from became_core import BecameError
from became_core.errors import first_line

__all__ = ["Checkpoint", "is_dense", "load_torch", "open_checkpoint", "read_json", "tensors_of_torch"]

ADAPTER_CONFIG = "adapter_config.json"
# The files of weights of a folder, in the order in which they are looked for.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
LONGEST_JSON = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A model on a disk.

    Attributes:
        path: the file or folder, as the user gave it.
        kind: what it is, for people.
        tensors: by name; of tensors that share memory the first.
        tied: the name of each tensor that shares the memory of another one, and that one's name.
        config: the content of ``config.json``, empty without one.
        companions: the tokenizer's, the configuration's and the other files that belong to the model.
        strangers: the names of the files and folders that do not belong to it, and are not copied.
        left_out: the folders in it that have weights of their own, which are neither read nor copied.
        metadata: text by name, of a safetensors file.
        adapter: the content of ``adapter_config.json`` if it is a LoRA adapter.
        ordered: whether tensors are in the order in which the model defines them.
    """

    path: Path
    kind: str
    tensors: Mapping[str, StoredTensor]
    tied: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    companions: tuple[Path, ...] = ()
    strangers: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    adapter: Mapping[str, Any] | None = None
    ordered: bool = False

    def __post_init__(self) -> None:
        """Refuse names and metadata that no file can hold; raises a BecameError."""
        if "__metadata__" in self.tensors:
            raise BecameError(f"{self.path} has a tensor '__metadata__', which means something else in safetensors.")
        for text in (*self.tensors, *self.metadata, *self.metadata.values()):
            try:
                text.encode()
            except UnicodeEncodeError:  # half of a pair of surrogates, which JSON and pickle can write
                raise BecameError(f"{self.path} has a name {ascii(text)[:80]}, which is no text in UTF-8.") from None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the tensors lie in."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Return what a file or a folder of a model holds; only headers are read.

    Raises:
        BecameError: if it is missing, of no known format, damaged, or leads out of its folder.
    """
    path = path_of(path, "path")
    allow_files()
    try:
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            raise BecameError(f"there is no {path}.")
        tensors, kind, metadata = _file(path)
    except OSError as error:  # a folder without permission, or a name that is too long
        raise BecameError(f"cannot read {path}: {error.strerror}.") from None
    return _without_shared(Checkpoint(path, kind, tensors, metadata=metadata, ordered=kind != "safetensors file"))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; raises a BecameError if it is none, or too long."""
    values = parse_json(read_file(path, LONGEST_JSON), path)
    if not isinstance(values, dict):
        raise BecameError(f"{path} holds no JSON object.")
    return values


def _file(path: Path) -> tuple[dict[str, StoredTensor], str, dict[str, str]]:
    check_is_file(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return tensors, "safetensors file", metadata
    if path.suffix == ".npz":
        return read_npz(path), "NumPy archive", {}
    if path.suffix in {".pt", ".pth", ".bin"}:
        return tensors_of_torch(_state_dict(load_torch(path), path), path), "PyTorch file", {}
    raise BecameError(
        f"{path} is no checkpoint that is known; give .safetensors, .pt, .pth, .bin or .npz, or a folder."
    )


def _folder(folder: Path) -> Checkpoint:
    if (folder / ADAPTER_CONFIG).exists():
        return _adapter_folder(folder)
    config = read_json(_inside(folder, "config.json")) if (folder / "config.json").exists() else {}
    files, index, kind = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for name in files:
        part, _, words = _file(_inside(folder, name))
        metadata = words | metadata
        for double in part.keys() & tensors.keys():
            raise BecameError(f"{part[double]} is in {tensors[double].file} too; the folder is damaged.")
        tensors |= part
    if index:
        _check_index(folder, index, tensors)
    kind = f"Hugging Face model, {kind}" if config else kind
    ordered = not files[0].endswith(".safetensors")
    return _without_shared(
        Checkpoint(folder, kind, tensors, config=config, metadata=metadata, ordered=ordered, **_beside(folder, files))
    )


def _adapter_folder(folder: Path) -> Checkpoint:
    adapter = read_json(_inside(folder, ADAPTER_CONFIG))
    names = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).exists()]
    if not names:
        raise BecameError(f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors.")
    tensors, _, metadata = _file(_inside(folder, names[0]))
    others = _beside(folder, [ADAPTER_CONFIG, names[0]])
    return Checkpoint(folder, "LoRA adapter", tensors, adapter=adapter, metadata=metadata, **others)


def _check_index(folder: Path, index: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise BecameError(f"the index of {folder} has '{name}' in {file}, which does not hold it.")
    for tensor in tensors.values():
        if tensor.name not in index:
            raise BecameError(f"{tensor} is not in the index of {folder}.")


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str], str]:
    """Return the names of a folder's files of weights, which file its index has each tensor in, and what it is."""
    for name in WEIGHTS:
        index_file = f"{name}.index.json"
        if (folder / name).exists():  # before shards, as transformers has it
            return [name], {}, "one file"
        if (folder / index_file).exists():
            index = _index(_inside(folder, index_file))
            shards = list(dict.fromkeys(index.values()))
            return sorted(shards), index, f"{len(shards)} shards"
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        index = _index(_inside(folder, indices[0].name))
        return sorted(dict.fromkeys(index.values())), index, f"{len(set(index.values()))} shards"
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(files) == 1:
        return files, {}, "one file"
    if files:
        raise BecameError(f"{folder} has {len(files)} files of tensors and no index; add model.safetensors.index.json.")
    raise BecameError(f"{folder} has no weights: no .safetensors, no pytorch_model.bin and no index of shards.")


def _index(file: Path) -> dict[str, str]:
    """Return the shard of each tensor; a shard is a file beside the index, and nothing else."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BecameError(f"{file} has no 'weight_map' from tensors to shards.")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and not any(c in shard for c in "/\\:\0")
        if not plain or not shard.endswith((".safetensors", ".bin")):
            raise BecameError(f"{file} has '{name}' in {str(shard)[:80]!r}, which is no file of weights beside it.")
        if not (file.parent / shard).is_file():
            raise BecameError(f"{file} names the shard {shard}, which is missing.")
    return weight_map


def _inside(folder: Path, name: str) -> Path:
    """Return a file of a folder, once it is known that no link leads elsewhere."""
    file = folder / name
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):
        raise BecameError(f"{file} is a link that leads nowhere, or there is no such file.") from None
    home = folder.resolve()
    caches = (place.parent / "blobs" for place in home.parents if place.name == "snapshots")  # of Hugging Face
    allowed = [home, *caches]
    if not any(target.is_relative_to(place) for place in allowed):
        raise BecameError(f"{file} is a link that leads out of its folder; copy the file there, or give its folder.")
    if not target.is_file():
        raise BecameError(f"{file} is no file.")
    return file


def _beside(folder: Path, own: Iterable[str]) -> dict[str, Any]:
    """Return what stands beside the weights of a model, as values of its ``Checkpoint``."""
    found = beside(folder, own)
    companions = tuple(_inside(folder, name) for name in found.belonging)
    return {"companions": companions, "strangers": found.others, "left_out": found.folders}


def _without_shared(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with one name for each memory that several tensors share."""
    owners: dict[object, str] = {}
    tied = {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.memory is not None and owners.setdefault(tensor.memory, name) != name:
            tied[name] = owners[tensor.memory]
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in tied}
    return Checkpoint(**{**vars(checkpoint), "tensors": tensors, "tied": tied})


def load_torch(path: Path) -> Any:
    """Return what PyTorch reads from a file without executing anything; tensors stay on the disk if they can."""
    try:
        import torch
    except ModuleNotFoundError:
        raise BecameError(f"{path} is a PyTorch file, which PyTorch alone reads; pip install torch.") from None
    try:
        check_is_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except BecameError:
        raise
    except OSError as error:
        raise BecameError(f"cannot read {path}: {error.strerror}.") from None
    except pickle.UnpicklingError:  # PyTorch's own sentence says how to execute it after all
        raise BecameError(
            f"{path} is no PyTorch file of weights alone: it is damaged, or holds what would have to be executed; save "
            "model.state_dict()."
        ) from None
    except Exception as error:  # PyTorch raises whatever a damaged archive leads it to
        raise BecameError(f"{path} is no PyTorch file of weights alone ({first_line(error)}).") from None


def _state_dict(loaded: Any, path: Path) -> dict[str, Any]:
    """Return the named tensors within what a training saved."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise BecameError(f"{path} holds no tensors by name; save model.state_dict().")
    return loaded


def tensors_of_torch(state: Mapping[str, Any], path: Path) -> dict[str, StoredTensor]:
    """Return PyTorch tensors as stored ones.

    Raises:
        BecameError: if a value is no dense tensor, or has a dtype that is not known.
    """
    import torch

    words = {str(torch.float8_e4m3fn): "F8_E4M3", str(torch.float8_e5m2): "F8_E5M2", "torch.bfloat16": "BF16"}
    tensors: dict[str, StoredTensor] = {}
    for name, value in state.items():
        if not is_dense(value):
            raise BecameError(f"'{name}' of {path} is no dense tensor in memory but {type(value).__name__}.")
        if str(name) in tensors:
            raise BecameError(f"{path} has '{name}' twice, as a text and as something else.")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise BecameError(f"'{name}' of {path} is expanded: it has more elements than are stored; save its clone.")
        word = words.get(str(value.dtype)) or numpy_word(str(value.dtype).removeprefix("torch."), f"'{name}' of {path}")
        memory = None if value.numel() == 0 else (value.data_ptr(), tuple(value.shape), value.stride())
        tensors[str(name)] = StoredTensor(str(name), word, tuple(value.shape), path, _bytes_of(value.detach()), memory)
    return tensors


def is_dense(value: Any) -> bool:
    """Return whether a value is a PyTorch tensor whose numbers are in memory, each at its own place."""
    import torch

    is_plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return bool(is_plain and not value.is_quantized and not value.is_nested)


def _bytes_of(value: Any) -> Callable[[int, int], NDArray[np.uint8]]:
    """Return what reads a range of a PyTorch tensor's bytes in C order; only the rows around it are in memory."""
    import torch

    while value.ndim > 1 and value.shape[0] == 1:  # one row would be the whole tensor
        value = value[0]
    width = max(prod(value.shape[1:]) * value.itemsize, 1)

    def read(first: int, last: int) -> NDArray[np.uint8]:
        top = 0 if value.is_contiguous() else first // width
        rows = value if value.is_contiguous() else value[top : -(-last // width)]
        part = rows.contiguous().reshape(-1).view(torch.uint8)[first - top * width : last - top * width]
        return np.asarray(part.numpy())

    return read
