"""TinyImageNet-200, from the Hugging Face hub, from a local folder in the hub's layout, or as the original zip unpacks.

Convention: 64×64 pixels; the labels are the 200 WordNet identifiers in the order of their names, as the hub has them,
in every layout; the published validation part, whose labels are known, is the test part.
"""

import re
from pathlib import Path

import numpy as np

from adapters.benchmarks.assembly import Part, assemble, check_classes
from adapters.benchmarks.huggingface import rows_of_hub
from adapters.benchmarks.images import image_files, read_files
from adapters.benchmarks.parquet import Columns, decode, read_images, split_files
from became_core.continual.data import Dataset
from became_core.errors import BecameError

__all__ = ["load_tinyimagenet"]

_REPOSITORY = "zh-plus/tiny-imagenet"
_FOLDER = "data"  # within the repository
_ZIP = "tiny-imagenet-200"  # the folder that the zip unpacks to
_SIZE, _CLASSES = 64, 200
_COLUMNS = Columns(image="image", label="label", size=_SIZE, classes=_CLASSES)


def load_tinyimagenet(data_dir: Path | None) -> Dataset:
    """Return TinyImageNet: uint8 [N, 3, 64, 64], the training rows (100,000) and then the validation rows (10,000).

    Args:
        data_dir: a folder that holds ``zh-plus/tiny-imagenet/data/{train,valid}-*.parquet``, or the zip's
            ``tiny-imagenet-200``; None reads the hub.

    Raises:
        BecameError: if the folder lacks files or classes, one of them is corrupt, or the hub cannot be reached.
    """
    if data_dir is None:
        parts = [decode(rows_of_hub(_REPOSITORY, split), _COLUMNS, _source(split)) for split in ("train", "valid")]
        return _assembled(parts, [_source("train"), _source("valid")])
    folder, unpacked = data_dir / _REPOSITORY / _FOLDER, data_dir / _ZIP
    if folder.is_dir():
        parts = [read_images(split_files(folder, split), _COLUMNS) for split in ("train", "valid")]
        return _assembled(parts, [f"{folder}/train-*.parquet", f"{folder}/valid-*.parquet"])
    if unpacked.is_dir():
        names = _class_names(unpacked / "wnids.txt")
        parts = [_training(unpacked / "train", names), _validation(unpacked / "val", names)]
        return _assembled(parts, [f"{unpacked}/train", f"{unpacked}/val"])
    raise BecameError(
        f"there is no folder {folder} and no folder {unpacked}: name by --data-dir the folder that holds "
        f"{_REPOSITORY}/{_FOLDER} or the zip's {_ZIP}."
    )


def _source(split: str) -> str:
    return f"the {split} split of {_REPOSITORY}"


def _assembled(parts: list[Part], sources: list[str]) -> Dataset:
    train, test = (check_classes(part, _CLASSES, source) for part, source in zip(parts, sources, strict=True))
    return assemble("tinyimagenet", train, test)


def _class_names(file: Path) -> list[str]:
    """Return the classes' WordNet identifiers, which are their folders' names, sorted."""
    names = sorted(set(_lines(file)))
    if len(names) != _CLASSES or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        raise BecameError(f"{file} must name {_CLASSES} classes, in each line one such as n01443537: fetch it again.")
    return names


def _training(folder: Path, names: list[str]) -> Part:
    files = [image_files(folder / name / "images") for name in names]
    labels = np.repeat(np.arange(len(names)), [len(each) for each in files])
    return read_files([file for each in files for file in each], _SIZE), labels


def _validation(folder: Path, names: list[str]) -> Part:
    annotations = folder / "val_annotations.txt"
    files, labels = [], []
    for number, line in enumerate(_lines(annotations), start=1):
        image, name, *_ = *line.split("\t"), ""  # then the corners of a box
        if name not in names or Path(image).name != image:
            raise BecameError(
                f"line {number} of {annotations} must begin with an image's name, a tab, and one of {_CLASSES} classes."
            )
        files.append(folder / "images" / image)
        labels.append(names.index(name))
    return read_files(files, _SIZE), np.array(labels, dtype=np.int64)


def _lines(file: Path) -> list[str]:
    """Return the lines of a text file, empty ones left out."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise BecameError(f"cannot read {file}: {error.strerror}; the folder must be as the zip unpacks.") from error
    except ValueError as error:
        raise BecameError(f"{file} is not text: fetch it again.") from error
