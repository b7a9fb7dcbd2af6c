"""From two labelled parts to one data set: training rows first, and what inputs are normalised with.

Convention: mean and standard deviation are per channel, over all pixels of the training part, scaled to [0, 1].
"""

import numpy as np
from numpy.typing import NDArray

from became_core.continual.data import Dataset
from became_core.errors import BecameError

__all__ = ["Part", "assemble", "assembled", "check_classes"]

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images, uint8 [N, C, H, W], and their labels, int64 [N]."""

_ROWS_AT_ONCE = 1024  # counting widens every pixel to 8 bytes, so it is done in slices


def assemble(name: str, train: Part, test: Part) -> Dataset:
    """Return the data set of a training and a test part, whose images must have one shape."""
    images, labels = np.concatenate([train[0], test[0]]), np.concatenate([train[1], test[1]])
    return assembled(name, images, labels, len(train[0]))


def assembled(name: str, images: NDArray[np.uint8], labels: NDArray[np.int64], train_size: int) -> Dataset:
    """Return the data set of images and labels, of which the first ``train_size`` are for training."""
    mean, std = _moments(images[:train_size])
    return Dataset(name=name, images=images, labels=labels, train_size=train_size, mean=mean, std=std)


def check_classes(part: Part, classes: int, source: str) -> Part:
    """Return a part as it is, if it has images of every class; ``source`` is what messages call it.

    Raises:
        BecameError: if one is missing.
    """
    missing = np.setdiff1d(np.arange(classes), part[1])
    if len(missing):
        raise BecameError(
            f"{source} holds no image of {len(missing)} of the {classes} classes, such as {missing[0]}: fetch it again."
        )
    return part


def _moments(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # A byte has 256 values, so a channel's histogram holds its exact mean and deviation.
    levels = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256)
        for start in range(0, len(images), _ROWS_AT_ONCE):
            counts += np.bincount(images[start : start + _ROWS_AT_ONCE, channel].ravel(), minlength=256)
        average = float(np.average(levels, weights=counts))
        mean.append(average)
        std.append(float(np.sqrt(np.average((levels - average) ** 2, weights=counts))))
    return tuple(mean), tuple(std)
