"""Data sets, the tasks that they are split into, and augmentation of training images.

Convention: a data set is one array of uint8 images [N, C, H, W], with all training rows before all test rows. A task is
index arrays into it. A learner therefore places the data set on its device once, and every batch is a row of indices.

Augmentation is random crops and flips, drawn here so that every backend trains on the same ones. An image is padded
with black pixels (zeros, before it is normalised), cropped to its size, and perhaps flipped from left to right, as
torchvision's ``RandomCrop`` and ``RandomHorizontalFlip`` do. Images are augmented in training alone, not in evaluation
and not for curvature or memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Array, device, namespace
from became_core.continual.rng import random_generator
from became_core.errors import BecameError

__all__ = ["Augmentation", "ClassOrder", "Dataset", "Task", "TaskStream", "Views", "permute_pixels", "split_classes"]


Indices = NDArray[np.int64]
ClassOrder = Literal["label", "seeded"]


@dataclass(frozen=True)
class Dataset:
    """Labelled images.

    Attributes:
        name: its name in messages and records.
        images: uint8, [N, C, H, W]; the first ``train_size`` rows are the training part, the others the test part.
        labels: int64, [N], from 0 to ``classes`` - 1.
        train_size: the number of training rows.
        mean: for each channel, the mean of pixels scaled to [0, 1], with which inputs are normalised.
        std: for each channel, the standard deviation of pixels scaled to [0, 1], with which inputs are normalised.
    """

    name: str
    images: NDArray[np.uint8]
    labels: Indices
    train_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        index: its number, from 0, which is also the number of its head.
        classes: the labels of its classes in the data set, in the order of the head's outputs.
        train: the rows of the data set that are trained on.
        validation: the training rows that are held out.
        test: the rows that it is scored on.
    """

    index: int
    classes: tuple[int, ...]
    train: Indices
    validation: Indices
    test: Indices


@dataclass(frozen=True)
class TaskStream:
    """A sequence of tasks over one data set.

    Attributes:
        dataset: the images, and their labels among all classes.
        tasks: the tasks, in the order in which they are learned.
        targets: int64, [N]: the label of each row within its own task, from 0 to ``classes_per_task`` - 1.
    """

    dataset: Dataset
    tasks: tuple[Task, ...]
    targets: Indices

    @property
    def classes_per_task(self) -> int:
        """The number of classes of every task, which is the number of outputs of every head."""
        return len(self.tasks[0].classes)

    def first(self, count: int) -> Self:
        """Return the stream of the first ``count`` tasks.

        Raises:
            BecameError: if the count is below 1, or there are fewer tasks.
        """
        if not 1 <= count <= len(self.tasks):
            raise BecameError(
                f"the first {count} tasks are asked for; {self.dataset.name} is split into {len(self.tasks)}."
            )
        return replace(self, tasks=self.tasks[:count])


def split_classes(
    dataset: Dataset,
    tasks: int,
    *,
    validation: float = 0.05,
    seed: int = 0,
    class_order: ClassOrder | Sequence[int] = "label",
) -> TaskStream:
    """Split a data set by classes into tasks with equally many classes.

    Args:
        dataset: the data set.
        tasks: the number of tasks; it must divide the number of classes.
        validation: the fraction of each task's training rows that is held out, chosen at random.
        seed: the seed of the choice of validation rows, and of the class order if it is "seeded".
        class_order: the order in which classes are given to tasks: "label" for the order of their labels, "seeded" for
            a random one, or a permutation of the classes.

    Raises:
        BecameError: if the number of tasks does not divide the number of classes, the fraction is not in [0, 1), or
            the class order is no permutation of the classes.

    Examples:
        >>> images, labels = np.zeros((8, 1, 2, 2), np.uint8), np.array([0, 1, 2, 3] * 2)
        >>> dataset = Dataset("tiny", images, labels, train_size=4, mean=(0.0,), std=(1.0,))
        >>> [task.classes for task in split_classes(dataset, 2, validation=0.0).tasks]
        [(0, 1), (2, 3)]
    """
    if tasks < 1 or dataset.classes % tasks:
        raise BecameError(f"{tasks} tasks do not divide the {dataset.classes} classes of {dataset.name}.")
    if not 0 <= validation < 1:
        raise BecameError(f"the validation fraction is {validation}; it must be at least 0 and below 1.")
    if class_order == "seeded":
        order = random_generator(seed, "class order").permutation(dataset.classes)
    else:
        order = np.arange(dataset.classes) if class_order == "label" else np.asarray(class_order)
    if sorted(order.tolist()) != list(range(dataset.classes)):
        raise BecameError(f"the class order is not a permutation of the {dataset.classes} classes of {dataset.name}.")
    groups = order.reshape(tasks, -1)
    position = np.empty(dataset.classes, dtype=np.int64)  # the number of each class within its task
    position[groups] = np.arange(groups.shape[1])
    return TaskStream(
        dataset=dataset,
        tasks=tuple(_task(dataset, index, group, validation, seed) for index, group in enumerate(groups)),
        targets=position[dataset.labels],
    )


def _task(dataset: Dataset, index: int, group: Indices, validation: float, seed: int) -> Task:
    rows = np.flatnonzero(np.isin(dataset.labels, group))
    train, test = rows[rows < dataset.train_size], rows[rows >= dataset.train_size]
    train = random_generator(seed, "validation", index).permutation(train)
    held_out = round(validation * len(train))
    return Task(
        index=index,
        classes=tuple(group.tolist()),
        train=np.sort(train[held_out:]),
        validation=np.sort(train[:held_out]),
        test=test,
    )


def permute_pixels(dataset: Dataset, tasks: int) -> Dataset:
    """Return a data set with a copy of all images for each task, each with another pixel order (Goodfellow 2014).

    With C the number of classes of the data set, copy t has the classes C t to C (t + 1) - 1. So ``split_classes`` into
    the same number of tasks, in label order, gives every pixel order to a task, and a head, of its own. The first copy
    has the original order. In every other copy, one order is used for all channels and images, and in every run.

    Raises:
        BecameError: if the number of tasks is below 1.
    """
    if tasks < 1:
        raise BecameError(f"{tasks} tasks of permuted pixels are asked for; give at least 1.")
    flat = dataset.images.reshape(*dataset.images.shape[:2], -1)
    pixels = np.arange(flat.shape[2])
    orders = [random_generator(0, "pixels", task).permutation(pixels) if task else pixels for task in range(tasks)]
    parts = [slice(0, dataset.train_size), slice(dataset.train_size, None)]  # All training rows must come first.
    images = np.concatenate([flat[part][:, :, order] for part in parts for order in orders])
    labels = [dataset.labels[part] + dataset.classes * task for part in parts for task in range(tasks)]
    return replace(
        dataset,
        name=f"permuted {dataset.name}",
        images=images.reshape(-1, *dataset.images.shape[1:]),
        labels=np.concatenate(labels),
        train_size=dataset.train_size * tasks,
    )


class Views(NamedTuple):
    """The crop and the flip of each image of a batch.

    Attributes:
        offsets: integers [N, 2]: how many pixels the crop's upper left corner is below, and to the right of, the
            image's.
        flips: booleans [N]: whether the crop is then flipped from left to right.
    """

    offsets: Array
    flips: Array

    def apply(self, images: Array, *, axis: int) -> Array:
        """Return the images, cropped and flipped; it works in any framework, and can be compiled.

        Args:
            images: [N, ...]; the axis of widths is the one after that of heights.
            axis: the axis of heights: 2 for [N, C, H, W], 1 for [N, H, W, C].
        """
        xp: Any = namespace(images=images)
        offsets = xp.asarray(self.offsets, device=device(images))
        flips = xp.asarray(self.flips, device=device(images))
        rows, columns = (
            xp.arange(images.shape[side], dtype=offsets.dtype, device=device(images)) for side in (axis, axis + 1)
        )
        columns = xp.where(flips[:, None], xp.flip(columns)[None, :], columns[None, :])
        cropped = _taken(images, rows[None, :] + offsets[:, :1], axis)
        return _taken(cropped, columns + offsets[:, 1:], axis + 1)


def _taken(images: Array, positions: Array, axis: int) -> Array:
    """Return the pixels at positions [N, size] along an axis of each image; a position beyond the border is black."""
    xp: Any = namespace(images=images)
    others = [other for other in range(1, len(images.shape)) if other != axis]
    for other in others:  # to [N, 1, ..., size, ..., 1]
        positions = xp.expand_dims(positions, axis=other)
    last = images.shape[axis] - 1
    pixels = xp.take_along_axis(images, xp.clip(positions, 0, last), axis=axis)
    return xp.where((positions >= 0) & (positions <= last), pixels, xp.zeros_like(pixels))


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented at random.

    Attributes:
        padding: how many black pixels are added at each side before the image is cropped to its size.
        flips: whether each image is flipped with probability 1/2.

    Raises:
        BecameError: if the padding is negative.
    """

    padding: int = 4
    flips: bool = True

    def __post_init__(self) -> None:
        """Check the padding."""
        if self.padding < 0:
            raise BecameError(f"the augmentation's padding is {self.padding} pixels; it must be at least 0.")

    def draw(self, count: int, rng: np.random.Generator) -> Views:
        """Return the crops and flips of ``count`` images."""
        offsets = rng.integers(-self.padding, self.padding, (count, 2), endpoint=True)
        # Flips are drawn in any case, so that later draws do not depend on whether images are flipped.
        flips = rng.integers(0, 2, count).astype(bool)
        return Views(offsets, flips & self.flips)
