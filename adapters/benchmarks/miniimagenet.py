"""miniImageNet, which each user obtains: ``DATA/mini-imagenet/`` with the parts train and, if there are any, val, test.

A part is any of: ``PART-*.parquet`` (columns image, label), ``PART.npz`` (arrays images, labels), ``PART-images.npy``
beside ``PART-labels.npy``, ``PART/CLASS/*.jpg``. Convention: 84×84 pixels; the hundred classes in the order of their
labels or folders' names.

Two kinds of parts are about. Those of continual learning (Chaudhry 2019, and so GPM) share all classes, 500 images of
each for training and 100 for testing: they are taken as they are. Those of few-shot learning (Ravi & Larochelle 2017)
have classes of their own, 64, 16 and 20: they are joined, and of every class the last sixth, 100 of its 600 images in
the files' order, is held out for testing; so it is if there is but one part.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters.benchmarks.archives import read_archive
from adapters.benchmarks.assembly import Part, assemble, check_classes
from adapters.benchmarks.images import image_files, read_files, subfolders
from adapters.benchmarks.parquet import Columns, read_images, split_files
from became_core.continual.data import Dataset
from became_core.errors import BecameError

__all__ = ["load_miniimagenet"]

_FOLDER = "mini-imagenet"
_SIZE, _CLASSES = 84, 100
_COLUMNS = Columns(image="image", label="label", size=_SIZE, classes=_CLASSES)
_PARTS = (("train",), ("val", "valid", "validation"), ("test",))  # and what each may be called
_HELD_OUT = 6  # one in so many, where no part is for testing


def load_miniimagenet(data_dir: Path | None) -> Dataset:
    """Return miniImageNet: uint8 [N, 3, 84, 84], the training rows (50,000) and then the test rows (10,000).

    Args:
        data_dir: the folder that holds ``mini-imagenet``; None is refused, since it may not be handed on.

    Raises:
        BecameError: if there is no such folder, no part in it, a file is corrupt, or classes are missing.
    """
    if data_dir is None:
        raise BecameError(
            "miniImageNet's licence asks everyone to obtain it themselves: name by --data-dir the folder that holds "
            f"{_FOLDER}."
        )
    folder = data_dir / _FOLDER
    if not folder.is_dir():
        raise BecameError(f"there is no folder {folder}: name by --data-dir the folder that holds {_FOLDER}.")
    named = [_named_part(folder, names) for names in _PARTS]
    parts = [part for part in named if part is not None]
    if not parts:
        raise BecameError(
            f"{folder} holds no part that can be read: train-*.parquet, train.npz, train-images.npy with "
            "train-labels.npy, or train/CLASS/*.jpg (pickle files never are: save their arrays as train.npz)."
        )
    train, test = _split(parts, official=named[2] is not None, folder=folder)
    return assemble("miniimagenet", train, test)


# Images, and each one's class by its label or its folder's name.
_Named = tuple[NDArray[np.uint8], NDArray[np.int64] | NDArray[np.str_]]


def _named_part(folder: Path, names: tuple[str, ...]) -> _Named | None:
    for name in names:
        if any(folder.glob(f"{name}-*.parquet")):
            return read_images(split_files(folder, name), _COLUMNS)
        archive = read_archive(folder, name, _SIZE)
        if archive is not None:
            return archive
        if (folder / name).is_dir():
            files = [(each.name, file) for each in subfolders(folder / name) for file in image_files(each)]
            return read_files([file for _, file in files], _SIZE), np.array(
                [label for label, _ in files], dtype=np.str_
            )
    return None


def _split(parts: list[_Named], *, official: bool, folder: Path) -> tuple[Part, Part]:
    """Return the training and the test part, labels 0 … 99."""
    kinds = {labels.dtype.kind for _, labels in parts}
    classes = [set(labels.tolist()) for _, labels in parts]
    if len(kinds) > 1:
        raise BecameError(f"{folder} holds parts with classes by name and parts with classes by number: give one kind.")
    every = set().union(*classes)
    if len(every) != _CLASSES:
        raise BecameError(f"the parts of {folder} have {len(every)} classes in all; they must have {_CLASSES}.")
    order = np.array(sorted(every))
    numbered = [(images, np.searchsorted(order, labels)) for images, labels in parts]
    if official and len(parts) > 1 and all(each == every for each in classes):
        return _joined(numbered[:-1]), numbered[-1]
    if sum(len(each) for each in classes) != len(every):
        raise BecameError(
            f"the parts of {folder} share some of their classes but not all; they must share all {_CLASSES} or none."
        )
    images, labels = _joined(numbered)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(_CLASSES):
        rows = np.flatnonzero(labels == label)
        is_test[rows[len(rows) - round(len(rows) / _HELD_OUT) :]] = True
    test = check_classes((images[is_test], labels[is_test]), _CLASSES, f"the last sixth of each class of {folder}")
    return (images[~is_test], labels[~is_test]), test


def _joined(parts: list[Part]) -> Part:
    if len(parts) == 1:  # the whole data set takes 1.3 GB
        return parts[0]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
