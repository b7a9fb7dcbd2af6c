"""A continual benchmark as data: the images, and the tasks as index arrays into them.

Convention: a data set is one array of uint8 images [N, C, H, W], training rows before test rows, so that a learner
places it on its device once and every batch, of any task and any part, is a row of indices.


Augmentation: random crops and flips of training images, drawn here so that every backend trains on the same ones.

Convention: an image is padded with black (zeros, before it is normalised) and cropped to its size again, then flipped
left to right or not, as torchvision's ``RandomCrop`` and ``RandomHorizontalFlip`` do. Evaluation, curvature and memory
see images as they are.
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
    """Labelled images, held once.

    Attributes:
        name: what messages and records call it.
        images: uint8, [N, C, H, W]; the first ``train_size`` rows are the training part, the rest the test part.
        labels: int64, [N], classes 0 … ``classes`` − 1.
        train_size: how many leading rows are for training.
        mean: per channel, of pixels scaled to [0, 1]; what inputs are normalised with.
        std: per channel, likewise.
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
    """One task: a head's index, the classes it tells apart, and rows of the data set for each part."""

    index: int
    classes: tuple[int, ...]
    train: Indices
    validation: Indices
    test: Indices


@dataclass(frozen=True)
class TaskStream:
    """A sequence of tasks over one data set.

    Attributes:
        dataset: the images and their global labels.
        tasks: in the order in which they are learned.
        targets: int64, [N]: each row's label within its own task, 0 … ``classes_per_task`` − 1.
    """

    dataset: Dataset
    tasks: tuple[Task, ...]
    targets: Indices

    @property
    def classes_per_task(self) -> int:
        """The width of every head."""
        return len(self.tasks[0].classes)

    def first(self, count: int) -> Self:
        """Return the stream of the first so many tasks.

        Raises:
            BecameError: if there are not so many.
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
    """Split a data set by classes into tasks of equal width, in label order unless told otherwise.

    Args:
        dataset: what to split.
        tasks: the number of tasks; it must divide the number of classes.
        validation: the fraction of each task's training rows held out, drawn at random by ``seed``.
        seed: names the draw of the validation rows, and of the class order if it is "seeded".
        class_order: "label", "seeded", or a permutation of the classes.

    Raises:
        BecameError: if the classes cannot be split so, or the fraction is not in [0, 1).
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
    position = np.empty(dataset.classes, dtype=np.int64)  # a class's place within its task
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
    """Return a data set of so many copies of each image, each copy with its pixels in another order (Goodfellow 2014).

    Copy t has the classes C t … C (t + 1) − 1, C the number of classes of the data set, so that ``split_classes`` into
    as many tasks, in label order, gives every permutation to a task, and a head, of its own. The first copy is as it
    was; every other has one order of its pixels, the same for all channels and images, and for every run.

    Raises:
        BecameError: if the number of tasks is not at least 1.
    """
    if tasks < 1:
        raise BecameError(f"{tasks} tasks of permuted pixels are asked for; give at least 1.")
    flat = dataset.images.reshape(*dataset.images.shape[:2], -1)
    pixels = np.arange(flat.shape[2])
    orders = [random_generator(0, "pixels", task).permutation(pixels) if task else pixels for task in range(tasks)]
    parts = [slice(0, dataset.train_size), slice(dataset.train_size, None)]  # all training rows before all test rows
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
    """How each image of a batch is seen.

    Attributes:
        offsets: integers [N, 2]: how far down and to the right of the image's corner the crop's corner is.
        flips: booleans [N]: whether the crop is then flipped left to right.
    """

    offsets: Array
    flips: Array

    def shown(self, images: Array, *, axis: int) -> Array:
        """Return images as they are seen; of any framework, and within what it compiles.

        Args:
            images: [N, …], heights and widths being two axes beside one another.
            axis: the one of heights: 2 of [N, C, H, W], 1 of [N, H, W, C].
        """
        xp: Any = namespace(images=images)
        offsets = xp.asarray(self.offsets, device=device(images))
        flips = xp.asarray(self.flips, device=device(images))
        height, width = (
            xp.arange(images.shape[each], dtype=offsets.dtype, device=device(images)) for each in (axis, axis + 1)
        )
        mirrored = xp.where(flips[:, None], xp.flip(width)[None, :], width[None, :])
        seen = _taken(images, height[None, :] + offsets[:, :1], axis)
        return _taken(seen, mirrored + offsets[:, 1:], axis + 1)


def _taken(images: Array, places: Array, axis: int) -> Array:
    """Return what lies at places [N, size] along an axis of each image, black where that is beyond the border."""
    xp: Any = namespace(images=images)
    others = [other for other in range(1, len(images.shape)) if other != axis]
    for other in others:  # [N, 1, …, size, …, 1]
        places = xp.expand_dims(places, axis=other)
    last = images.shape[axis] - 1
    found = xp.take_along_axis(images, xp.clip(places, 0, last), axis=axis)
    return xp.where((places >= 0) & (places <= last), found, xp.zeros_like(found))


@dataclass(frozen=True)
class Augmentation:
    """What views are drawn.

    Attributes:
        padding: how many black pixels are added at each side before a crop.
        flips: whether every other image, at random, is flipped.
    """

    padding: int = 4
    flips: bool = True

    def __post_init__(self) -> None:
        """Check the padding."""
        if self.padding < 0:
            raise BecameError(f"the augmentation's padding is {self.padding} pixels; it must be at least 0.")

    def draw(self, count: int, stream: np.random.Generator) -> Views:
        """Return the views of so many images."""
        offsets = stream.integers(-self.padding, self.padding, (count, 2), endpoint=True)
        flips = stream.integers(0, 2, count).astype(bool)
        return Views(offsets, flips & self.flips)
