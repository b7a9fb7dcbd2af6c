"""ImageNet-R (Hendrycks 2021), which has no parts for training and testing: ``DATA/imagenet-r/CLASS/*.jpg``.

Convention: the 200 classes in the order of their folders' names, WordNet identifiers; images of any size are resized
until the shorter side has 256 pixels, and their middle 224×224 are kept, as InfLoRA's published code tests on them.

Of all images, a random fifth is for testing. The draw is the one with which InfLoRA's code (Liang & Li, CVPR 2024)
begins, for the seed 0: PyTorch's permutation of all images in the order of folders and names, cut after int(0.8 N). Its
numbers are those of NumPy's Mersenne twister, so that PyTorch is not needed. The code moves the images into the folders
``train`` and ``test``; where these are, they are taken as they are. CODA-Prompt's lists of files are not read.
"""

from pathlib import Path

import numpy as np

from adapters.benchmarks.assembly import assembled, check_classes
from adapters.benchmarks.images import image_files, read_resized, subfolders
from became_core.continual.data import Dataset, Indices
from became_core.errors import BecameError

__all__ = ["load_imagenet_r"]

_FOLDER = "imagenet-r"
_PARTS = ("train", "test")
_SHORTER, _SIZE, _CLASSES = 256, 224, 200


def load_imagenet_r(data_dir: Path | None) -> Dataset:
    """Return ImageNet-R: uint8 [N, 3, 224, 224], the training rows (24,000) and then the test rows (6,000); 4.5 GB.

    Args:
        data_dir: the folder that holds ``imagenet-r``, as its archive unpacks; None is refused.

    Raises:
        BecameError: if there is no such folder, it lacks classes, or an image is corrupt.
    """
    folder = None if data_dir is None else data_dir / _FOLDER
    if folder is None or not folder.is_dir():
        missing = "ImageNet-R is read from a folder" if folder is None else f"there is no folder {folder}"
        raise BecameError(
            f"{missing}: name by --data-dir the folder that holds {_FOLDER}, as imagenet-r.tar unpacks "
            "(https://github.com/hendrycks/imagenet-r)."
        )
    if all((folder / part).is_dir() for part in _PARTS):
        (train, first), (test, second) = (_files(folder / part) for part in _PARTS)
        files, labels, train_size = train + test, np.concatenate([first, second]), len(train)
    else:
        files, labels = _files(folder)
        order, train_size = _permutation(len(files)), int(0.8 * len(files))
        files, labels = [files[row] for row in order], labels[order]
    images = read_resized(files, _SHORTER, _SIZE)
    for part, rows in zip(_PARTS, (slice(train_size), slice(train_size, None)), strict=True):
        check_classes((images[rows], labels[rows]), _CLASSES, f"the {part} part of {folder}")
    return assembled("imagenet-r", images, labels, train_size)


def _files(folder: Path) -> tuple[list[Path], Indices]:
    """Return the images of all classes, and the number of each one's class."""
    classes = subfolders(folder)
    if len(classes) != _CLASSES:
        raise BecameError(f"{folder} holds {len(classes)} folders; it must hold one for each of {_CLASSES} classes.")
    files = [image_files(each) for each in classes]
    labels = np.repeat(np.arange(_CLASSES), [len(each) for each in files])
    return [file for each in files for file in each], labels


def _permutation(count: int) -> Indices:
    """Return what ``torch.randperm(count)`` returns after ``torch.manual_seed(0)``."""
    draws = np.random.RandomState(0).randint(0, 2**32, count, dtype=np.uint32)
    order = np.arange(count)
    for place in range(count - 1):
        other = place + int(draws[place]) % (count - place)
        order[place], order[other] = order[other], order[place]
    return order
