"""How data sets are split into tasks: by classes, by domains, or by permutations of the pixels.

Convention: validation rows are drawn from each task's training rows by the seed, and rows stay in their order.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from became_core.continual.data import Augmentation, Dataset, Task, TaskStream
from became_core.continual.rng import random_generator
from became_core.errors import BecameError

__all__ = [
    "ClassOrder",
    "CurvatureData",
    "ScoredPart",
    "measured_on",
    "permute_pixels",
    "scored_on",
    "split_classes",
    "split_domains",
]

ClassOrder = Literal["label", "seeded"]

CurvatureData = Literal["training", "validation", "augmented"]
"""On which samples of a task its loss and curvature are measured."""

ScoredPart = Literal["test", "validation"]
"""On which samples of a task models are scored."""


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
        BecameError: if the number of tasks does not divide the number of classes, the fraction is not in [0, 1), the
            class order is no permutation of the classes, or a class has no training images.

    Examples:
        >>> images, labels = np.zeros((8, 1, 2, 2), np.uint8), [0, 1, 2, 3, 0, 1, 2, 3]
        >>> dataset = Dataset("tiny", images, labels, train_size=4, mean=(0.0,), std=(1.0,))
        >>> [task.classes for task in split_classes(dataset, 2, validation=0.0).tasks]
        [(0, 1), (2, 3)]
    """
    if tasks < 1 or dataset.classes % tasks:
        raise BecameError(f"{tasks} tasks do not divide the {dataset.classes} classes of {dataset.name}.")
    if not 0 <= validation < 1:
        raise BecameError(f"the validation fraction is {validation}; it must be at least 0 and below 1.")
    counts = np.bincount(dataset.labels[: dataset.train_size], minlength=dataset.classes)
    if not counts.all():
        raise BecameError(
            f"{dataset.name} has no training samples of class {int(np.argmin(counts))}; labels must go from 0 to the "
            "classes - 1 without a gap."
        )
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
        tasks=tuple(
            _task(dataset, index, np.isin(dataset.labels, group), tuple(group.tolist()), validation, seed)
            for index, group in enumerate(groups)
        ),
        targets=position[dataset.labels],
    )


def split_domains(dataset: Dataset, *, validation: float = 0.05, seed: int = 0, shared_head: bool = True) -> TaskStream:
    """Split a data set into a task for each of its domains, in the order of their numbers.

    Targets that are no labels are standardised, if the likelihood says so: they have the mean 0 and the standard
    deviation 1 over the training rows of all domains.

    Args:
        dataset: with domains; each must have training and test rows.
        validation: the fraction of each task's training rows that is held out, chosen at random.
        seed: the seed of the choice of validation rows.
        shared_head: whether all tasks have one head (domain-incremental), or each its own.

    Raises:
        BecameError: if the data set has no domains, one of them has no rows, or the fraction is not in [0, 1).

    Examples:
        >>> table, domains = np.zeros((6, 2, 1, 1), np.float32), [0, 0, 1, 0, 1, 1]
        >>> dataset = Dataset("tiny", table, [0, 1, 0, 1, 0, 1], 3, (0.0, 0.0), (1.0, 1.0), domains=domains)
        >>> [task.train.tolist() for task in split_domains(dataset, validation=0.0).tasks]
        [[0, 1], [2]]
    """
    if dataset.domains is None:
        raise BecameError(f"{dataset.name} has no domains to make tasks of.")
    if not 0 <= validation < 1:
        raise BecameError(f"the validation fraction is {validation}; it must be at least 0 and below 1.")
    targets, scale = dataset.labels, 1.0
    if not dataset.likelihood.has_labels and dataset.likelihood.is_standardised:
        train = dataset.labels[: dataset.train_size]
        scale = float(np.sqrt(train.var(axis=0).mean()))
        if scale == 0:
            raise BecameError(f"the targets of {dataset.name} are all alike, so that there is nothing to learn.")
        targets = (dataset.labels - train.mean(axis=0)) / scale
    outputs = tuple(range(dataset.classes))
    tasks = tuple(
        _task(dataset, index, dataset.domains == index, outputs, validation, seed)
        for index in range(int(dataset.domains.max()) + 1)
    )
    return TaskStream(dataset, tasks, targets, shared_head, scale)


def _task(
    dataset: Dataset, index: int, chosen: NDArray[np.bool_], classes: tuple[int, ...], validation: float, seed: int
) -> Task:
    rows = np.flatnonzero(chosen)
    train, test = rows[rows < dataset.train_size], rows[rows >= dataset.train_size]
    train = random_generator(seed, "validation", index).permutation(train)
    held_out = round(validation * len(train))
    return Task(
        index=index,
        classes=classes,
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


def scored_on(stream: TaskStream, part: ScoredPart) -> TaskStream:
    """Return a stream whose tasks are scored on other samples than the test samples.

    Settings that are chosen by scores on held-out training samples leave the test samples for one last measurement.

    Args:
        stream: the tasks.
        part: "test" for the test rows, which returns the stream itself; "validation" for each task's held-out rows,
            which then take the place of its test rows.

    Raises:
        BecameError: if a task has no held-out rows.

    Examples:
        >>> images, labels = np.zeros((8, 1, 2, 2), np.uint8), [0, 1, 0, 1, 0, 1, 0, 1]
        >>> stream = split_classes(Dataset("tiny", images, labels, 6, mean=(0.0,), std=(1.0,)), 1, validation=0.5)
        >>> len(stream.tasks[0].test), len(scored_on(stream, "validation").tasks[0].test)
        (2, 3)
    """
    if part == "test":
        return stream
    _check_held_out(stream, "score models on")
    return replace(stream, tasks=tuple(replace(task, test=task.validation) for task in stream.tasks))


def _check_held_out(stream: TaskStream, purpose: str) -> None:
    for task in stream.tasks:
        if not len(task.validation):
            raise BecameError(
                f"task {task.index + 1} of {stream.dataset.name} has no held-out samples to {purpose}; give a larger "
                "share for validation."
            )


def measured_on(stream: TaskStream, data: CurvatureData, *, seed: int = 0, samples: int | None = None) -> TaskStream:
    """Return a stream whose losses and curvature are measured on other samples than those that are trained on.

    Args:
        stream: the tasks.
        data: "training" for the training rows, which returns the stream itself; "validation" for each task's held-out
            rows; "augmented" for training images, each cropped and flipped at random once. These copies become further
            rows of the data set, after all others; no task trains on them or is tested on them.
        seed: the seed of the choice of rows, and of the views.
        samples: how many rows of each task are measured; all if None, or if there are fewer.

    Raises:
        BecameError: if a task has no held-out rows, or the samples are no images that can be cropped and flipped.

    Examples:
        >>> images, labels = np.zeros((8, 1, 2, 2), np.uint8), [0, 1, 0, 1, 0, 1, 0, 1]
        >>> stream = split_classes(Dataset("tiny", images, labels, 6, mean=(0.0,), std=(1.0,)), 1, validation=0.5)
        >>> len(measured_on(stream, "validation").tasks[0].curvature)
        3
        >>> measured_on(stream, "augmented").tasks[0].curvature
        array([ 8,  9, 10])
    """
    if data == "training":
        return stream
    if data == "validation":
        _check_held_out(stream, "measure curvature on")
        return replace(stream, tasks=tuple(replace(task, curvature=task.validation) for task in stream.tasks))
    dataset = stream.dataset
    dataset.check_images(", so curvature cannot be measured on augmented samples")
    rows = [
        random_generator(seed, "curvature", task.index).permutation(task.measured)[:samples] for task in stream.tasks
    ]
    copies = [
        Augmentation()
        .draw(len(part), random_generator(seed, "curvature-views", task))
        .apply(dataset.images[part], axis=2)
        for task, part in enumerate(rows)
    ]
    ends = len(dataset.images) + np.cumsum([len(part) for part in rows])
    everything = np.concatenate([np.arange(len(dataset.images)), *rows])
    further: dict[str, Any] = {} if dataset.domains is None else {"domains": dataset.domains[everything]}
    images = np.concatenate([dataset.images, *copies])
    return replace(
        stream,
        dataset=replace(
            dataset, images=images, labels=dataset.labels[everything], copies=sum(map(len, copies)), **further
        ),
        targets=stream.targets[everything],
        tasks=tuple(
            replace(task, curvature=np.arange(end - len(part), end))
            for task, part, end in zip(stream.tasks, rows, ends, strict=True)
        ),
    )
