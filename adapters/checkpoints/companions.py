"""What stands beside the weights in a model's folder: what belongs to the model, and what does not.

What belongs to a model, such as its tokenizer, its configuration and its licence, is copied beside a merged one. The
state and the results of a training are not copied, because they describe the model that was trained. Weights in other
formats and unknown files are not copied either. A merge names what it does not copy.

Convention: names are relative to the model's folder. Hidden files, and those that a merge writes anew, are left out.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

__all__ = ["Beside", "beside"]

# What belongs to a model, by its name in small letters.
BELONGING = (
    *("*.json", "*.jinja", "*.py", "*.txt", "*.yaml", "*.yml"),
    *("*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.vocab", "*.bpe", "*.codes"),
    *("license*", "licence*", "notice*", "copying*", "use_policy*"),
)
# What a training leaves behind, although its ending is one of those; DeepSpeed's files are the last three.
OF_TRAINING = (
    *("trainer_state.json", "training_args*", "optimizer*", "scheduler.*", "*results.json", "*results.txt"),
    *("latest", "latest.txt", "zero_to_fp32.py"),
)
FOLDERS_OF_TRAINING = ("runs", "logs", "wandb", "mlruns", "__pycache__")
# What a merge writes anew.
REPLACED = ("readme*", "*.index.json", "became_merge.json", "became_trace.json", "alpha.svg")
# By which a folder within a model's own is told to have weights of another one.
WEIGHT_ENDINGS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack", ".gguf", ".npz"}


@dataclass(frozen=True)
class Beside:
    """What stands beside a model's weights, by its name.

    Attributes:
        belonging: the files that belong to the model.
        others: files that do not belong to it, and folders of a training.
        folders: folders with weights of their own.
    """

    belonging: tuple[str, ...]
    others: tuple[str, ...]
    folders: tuple[str, ...]


def beside(folder: Path, own: Iterable[str]) -> Beside:
    """Return what stands beside the weights of a model.

    Args:
        folder: of the model.
        own: the names of its weights and of what else is read.

    Raises:
        OSError: if a folder cannot be listed.
    """
    names, others, folders = list[str](), list[str](), list[str]()
    for place in sorted(folder.iterdir()):
        if place.name.startswith("."):
            continue
        if not place.is_dir():
            names.append(place.name)
        elif place.name in FOLDERS_OF_TRAINING:
            others.append(f"{place.name}/")
        elif any(file.suffix in WEIGHT_ENDINGS for file in place.rglob("*")):
            folders.append(place.name)
        else:
            names += [file.relative_to(folder).as_posix() for file in _files_in(place)]
    read = set(own)
    names = [name for name in names if name not in read and not _is(name, REPLACED)]
    belonging = [name for name in names if _is(name, BELONGING) and not _is(name, OF_TRAINING)]
    return Beside(tuple(belonging), tuple(sorted({*names, *others} - {*belonging})), tuple(folders))


def _files_in(place: Path) -> list[Path]:
    """Return the files of a folder and of all folders in it that are not hidden."""

    def refuse(error: OSError) -> None:
        raise error

    files = []
    for folder, inner, names in os.walk(place, onerror=refuse):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files


def _is(name: str, patterns: Iterable[str]) -> bool:
    last = name.rpartition("/")[2].lower()
    return any(fnmatchcase(last, pattern) for pattern in patterns)
