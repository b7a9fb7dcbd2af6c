"""A continual benchmark as data: the images, and the tasks as index arrays into them.

Convention: a data set is one array of uint8 images [N, C, H, W], training rows before test rows, so that a learner
places it on its device once and every batch, of any task and any part, is a row of indices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from became_core.continual.seeding import random_stream
from became_core.errors import BecameError

__all__ = ["Dataset", "Task", "TaskStream", "split_classes"]

Indices = NDArray[np.int64]


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
    class_order: Sequence[int] | None = None,
) -> TaskStream:
    """Split a data set by classes into tasks of equal width, in label order unless told otherwise.

    Args:
        dataset: what to split.
        tasks: the number of tasks; it must divide the number of classes.
        validation: the fraction of each task's training rows held out, drawn at random by ``seed``.
        seed: names the draw of the validation rows.
        class_order: a permutation of the classes; label order if not given.

    Raises:
        BecameError: if the classes cannot be split so, or the fraction is not in [0, 1).
    """
    if tasks < 1 or dataset.classes % tasks:
        raise BecameError(f"{tasks} tasks do not divide the {dataset.classes} classes of {dataset.name}.")
    if not 0 <= validation < 1:
        raise BecameError(f"the validation fraction is {validation}; it must be at least 0 and below 1.")
    order = np.arange(dataset.classes) if class_order is None else np.asarray(class_order)
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
    train = random_stream(seed, "validation", index).permutation(train)
    held_out = round(validation * len(train))
    return Task(
        index=index,
        classes=tuple(group.tolist()),
        train=np.sort(train[held_out:]),
        validation=np.sort(train[:held_out]),
        test=test,
    )
