"""Data sets, the tasks that they are split into (``splits.py`` splits them), and augmentation of training images.

Convention: a data set is one array of images [N, C, H, W], with all training rows before all test rows. Images are
uint8 pixels from 0 to 255, which are scaled to [0, 1] and normalised there, or numbers in floating point, which are
normalised as they are. A task is index arrays into it. A learner therefore places the data set on its device once, and
every batch is a row of indices.

What is wrong with a data set or a stream is said when it is made, in one sentence: an error that comes out of a
framework after an hour of training, or a network that learns nothing, says less.

Augmentation is random crops and flips, drawn here so that every backend trains on the same ones. An image is padded
with black pixels (zeros, before it is normalised), cropped to its size, and perhaps flipped from left to right, as
torchvision's ``RandomCrop`` and ``RandomHorizontalFlip`` do. Images are augmented in training alone, not in evaluation
and not for curvature or memory.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Array, device, namespace
from became_core.curvature import Categorical, Likelihood
from became_core.errors import BecameError

__all__ = [
    "Augmentation",
    "Dataset",
    "Task",
    "TaskStream",
    "Views",
    "chunks",
]

# Normalised inputs have a mean square of about 1. Beyond this, images and statistics are in different units.
LARGEST_MEAN_SQUARE = 1000.0

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """Images or tables, and what is to be predicted of each row.

    Attributes:
        name: its name in messages and records.
        images: [N, C, H, W], uint8 or floating point; the first ``train_size`` rows are the training part, the others
            the test part. Tables of d numbers are images [N, d, 1, 1]. Text is sequences of bytes, uint8 [N, L], and
            has no means and deviations.
        labels: integers, [N], from 0 to ``classes`` - 1; they are kept as int64. If the likelihood has no labels, as
            the Gaussian has none, they are numbers [N, outputs], in the unit in which they are given, and are kept as
            float64. The labels of text are as these or, if the likelihood is by token, integers [N, L], one for each
            byte, such as the next byte; a byte with the label that the likelihood ignores does not count.
        train_size: the number of training rows.
        mean: for each channel, the mean with which inputs are normalised: of uint8 images that of pixels scaled to
            [0, 1], of others that of the numbers as they are.
        std: for each channel, the standard deviation with which inputs are normalised, in the unit of the mean.
        likelihood: what the network's outputs say of the labels.
        domains: integers, [N]: the domain of each row, from 0; None if rows are of no domains. ``split_domains`` makes
            a task of each.
        pictures: if the labels are pixels from 0 to 1, the height and the width of their pictures; None otherwise.
        copies: how many rows at the end are views of others, which ``measured_on`` adds.

    Raises:
        BecameError: if the images, labels and statistics do not fit together.

    Examples:
        >>> table, labels = np.array([[1.0, 20.0], [3.0, 40.0]], np.float32), [0, 1]
        >>> mean, std = table.mean(0), table.std(0)
        >>> Dataset("table", table[:, :, None, None], labels, 2, tuple(mean), tuple(std)).unit
        1.0
    """

    name: str
    images: NDArray[Any]
    labels: Indices
    train_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    likelihood: Likelihood = field(default_factory=Categorical)
    domains: Indices | None = None
    pictures: tuple[int, int] | None = None
    copies: int = 0

    def __post_init__(self) -> None:
        """Check that images, labels and statistics fit together, and turn labels into int64."""
        images = np.asarray(self.images)
        if not images.dtype.isnative:  # as some file formats have numbers, and no framework takes them
            images = images.astype(images.dtype.newbyteorder("="))
        object.__setattr__(self, "images", images)
        if not 1 <= self.train_size <= len(images):
            raise BecameError(
                f"{self.name} has {self.train_size} training samples among {len(images)}; give at least 1 of them."
            )
        if not self.is_text:
            self._check_images(images)
            self._check_statistics(images)
        elif images.dtype != np.uint8:
            raise BecameError(f"the text of {self.name} is {images.dtype}; give bytes as uint8 [N, L].")
        labels = self._checked_labels(len(images))
        object.__setattr__(self, "labels", labels)
        if self.domains is not None:
            domains = _integers(self.domains, f"the domains of {self.name}")
            if domains.shape != (len(images),) or domains.min() < 0:
                raise BecameError(f"{self.name} has domains {list(domains.shape)}; give one a row, from 0.")
            object.__setattr__(self, "domains", domains)
        if self.pictures is not None and self.pictures[0] * self.pictures[1] != self.classes:
            raise BecameError(f"{self.name} has pictures {self.pictures}, and {self.classes} pixels of each.")

    def _checked_labels(self, rows: int) -> NDArray[Any]:
        """Return labels as the likelihood needs them."""
        if not self.likelihood.has_labels:
            numbers = np.asarray(self.labels, np.float64)
            if numbers.ndim != 2 or len(numbers) != rows or not np.isfinite(numbers).all():
                raise BecameError(
                    f"{self.name} has {rows} rows and targets {list(numbers.shape)}; give finite numbers [N, outputs]."
                )
            return numbers
        labels = _integers(self.labels, f"the labels of {self.name}")
        if self.predicts_bytes:
            if labels.shape != self.images.shape:
                raise BecameError(
                    f"{self.name} has text {list(self.images.shape)} and labels {list(labels.shape)}; give a label for "
                    "each byte, or a likelihood that is not by token."
                )
            return labels
        if labels.shape != (rows,):
            raise BecameError(
                f"{self.name} has {rows} samples and labels {list(labels.shape)}; give one label a sample."
            )
        if len(labels) and labels.min() < 0:
            raise BecameError(f"{self.name} has the label {labels.min()}; labels go from 0 to the classes - 1.")
        return labels

    def _check_images(self, images: NDArray[Any]) -> None:
        """Raise an error if these are no images [N, C, H, W] with the channels of the statistics."""
        channels = len(self.mean)
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise BecameError(
                f"the images of {self.name} are {images.dtype}; give pixels as uint8, 0 to 255, or floating point."
            )
        if images.ndim != 4 or images.shape[1] != channels:
            hint = "a table [N, d] is images [N, d, 1, 1]" if images.ndim == 2 else "they must be [N, C, H, W]"
            if images.ndim == 4 and images.shape[-1] == channels:
                hint = "channels come first, as numpy.moveaxis(images, -1, 1) puts them"
            raise BecameError(
                f"the images of {self.name} are {list(images.shape)} and have {channels} means of channels; {hint}."
            )

    def _check_statistics(self, images: NDArray[Any]) -> None:
        """Raise an error if the statistics cannot be those of the images; then nothing would be learned."""
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        if mean.shape != std.shape or not np.isfinite([mean, std]).all() or not (std > 0).all():
            raise BecameError(
                f"{self.name} is normalised by the means {self.mean} and standard deviations {self.std}; give a finite "
                "number of each for every channel, and deviations above 0."
            )
        if images.dtype == np.uint8:
            if not ((mean >= 0) & (mean <= 1) & (std <= 1)).all():
                raise BecameError(
                    f"{self.name} is normalised by the means {self.mean} and standard deviations {self.std}; those of "
                    "uint8 images are of pixels scaled to [0, 1], so divide them by 255."
                )
            return
        # Without an array of squares, which would be as large as the samples, or larger. A statistic is one of the
        # training rows, as a test row may be far from all of them.
        images, test = images[: self.train_size], images[self.train_size :]
        per_channel = np.einsum("nchw,nchw->c", images, images, dtype=np.float64) / (images.size / images.shape[1])
        if not np.isfinite([*per_channel, np.einsum("nchw,nchw->", test, test, dtype=np.float64)]).all():
            raise BecameError(f"the samples of {self.name} have a number that is not finite.")
        first = np.mean(images, axis=(0, 2, 3), dtype=np.float64)
        square = (per_channel - 2 * mean * first + mean**2) / std**2  # of the normalised numbers
        if (square > LARGEST_MEAN_SQUARE).any():
            raise BecameError(
                f"the samples of {self.name} have the mean {first.tolist()}, and are normalised by the means "
                f"{self.mean} and standard deviations {self.std}; give those of the samples as they are."
            )

    @property
    def unit(self) -> float:
        """What 1 in ``mean`` and ``std`` is in the images: 255 for uint8, 1 for floating point."""
        return 255.0 if self.images.dtype == np.uint8 else 1.0

    @property
    def is_text(self) -> bool:
        """Whether samples are sequences of bytes."""
        return np.ndim(self.images) == 2 and len(self.mean) == 0

    def check_images(self, consequence: str) -> None:
        """Raise a BecameError if samples are no images that can be cropped and flipped.

        Args:
            consequence: how the sentence goes on, up to its full stop.
        """
        if self.is_text or self.pictures:
            what = "text is" if self.is_text else "samples that are rows of pixels and noise are"
            raise BecameError(f"{what} not cropped and flipped{consequence}.")

    @property
    def predicts_bytes(self) -> bool:
        """Whether each byte of a text has a label, such as the next byte."""
        return self.is_text and self.likelihood.unit == "bits per token"

    @property
    def classes(self) -> int:
        """The number of classes: of bytes that are predicted all 256, of targets that are no labels the outputs."""
        if self.predicts_bytes:
            return 256
        return int(self.labels.max()) + 1 if self.likelihood.has_labels else self.labels.shape[1]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        index: its number, from 0, which is also the number of its head.
        classes: the labels of its classes in the data set, in the order of the head's outputs; of targets that are no
            labels, the numbers of the outputs.
        train: the rows of the data set that are trained on.
        validation: the training rows that are held out.
        test: the rows that it is scored on.
        reservoir: the training rows that curvature and the projector's memory are computed from, if they are only some
            of them, as where a stream goes by; None for all training rows.
        curvature: the rows that the loss and its curvature are measured on, if they are not training rows: held-out
            rows, or copies of training images under other views. ``measured_on`` chooses them.
    """

    index: int
    classes: tuple[int, ...]
    train: Indices
    validation: Indices
    test: Indices
    reservoir: Indices | None = None
    curvature: Indices | None = None

    @property
    def measured(self) -> Indices:
        """The training rows that curvature and the projector's memory are computed from."""
        return self.train if self.reservoir is None else self.reservoir


@dataclass(frozen=True)
class TaskStream:
    """A sequence of tasks over one data set; tasks may differ in how many classes they have.

    Attributes:
        dataset: the images, and their labels among all classes.
        tasks: the tasks, in the order in which they are learned.
        targets: integers, [N]: the label of each row within its own task, from 0 to the task's classes - 1; they are
            kept as int64. Of text by token they are integers [N, L]. Targets that are no labels are numbers
            [N, outputs], standardised.
        shared_head: whether all tasks have one head, as where only the inputs change (domain-incremental learning); if
            not, each has a head of its own.
        target_scale: what 1 in targets that are no labels is in the unit of the data set's; 1 for labels.

    Raises:
        BecameError: if a task has no training or no test rows, a row is not in the data set, or a target is no class of
            its task.
    """

    dataset: Dataset
    tasks: tuple[Task, ...]
    targets: Indices
    shared_head: bool = False
    target_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check that the tasks are of this data set, and turn indices and targets into int64."""
        name, size = self.dataset.name, len(self.dataset.labels)
        labelled = self.dataset.likelihood.has_labels
        targets: Any = np.asarray(self.targets, np.float64)
        if labelled:
            targets = _integers(self.targets, f"the targets of {name}")
        if targets.shape != self.dataset.labels.shape:
            raise BecameError(f"{name} has {size} samples and targets {list(targets.shape)}; give one target a sample.")
        if not self.tasks:
            raise BecameError(f"{name} is split into no tasks; give at least one.")
        tasks = []
        for number, task in enumerate(self.tasks):
            where = f"task {number + 1} of {name}"
            if task.index != number:
                raise BecameError(f"{where} has the index {task.index}; it must be {number}.")
            parts = self._checked_parts(task, where, targets)
            if self.shared_head and len(task.classes) != len(self.tasks[0].classes):
                raise BecameError(
                    f"{where} has {len(task.classes)} classes; tasks that share a head have equally many."
                )
            tasks.append(replace(task, **parts))
        object.__setattr__(self, "tasks", tuple(tasks))
        object.__setattr__(self, "targets", targets)

    def _checked_parts(self, task: Task, where: str, targets: NDArray[Any]) -> dict[str, Any]:
        """Return a task's rows by part as int64, if its targets are its classes; ``where`` is how messages call it."""
        size = len(self.dataset.labels)
        parts: dict[str, Any] = {part: _integers(getattr(task, part), f"the {part} rows of {where}") for part in _PARTS}
        if task.reservoir is not None:
            parts["reservoir"] = _integers(task.reservoir, f"the reservoir of {where}")
            if not np.isin(parts["reservoir"], parts["train"]).all():
                raise BecameError(f"{where} has a reservoir of other rows than its training rows.")
        if task.curvature is not None:
            parts["curvature"] = _integers(task.curvature, f"the curvature rows of {where}")
        for part, rows in parts.items():
            if not len(rows) and part != "validation":
                raise BecameError(f"{where} has no {part} samples; give at least one.")
            if len(rows) and not (rows.min() >= 0 and rows.max() < size):
                raise BecameError(f"{where} has {part} rows beyond the {size} samples.")
            if self.dataset.predicts_bytes or not self.dataset.likelihood.has_labels:
                continue
            beyond = targets[rows][(targets[rows] < 0) | (targets[rows] >= len(task.classes))]
            if len(beyond):
                raise BecameError(
                    f"{where} has {len(task.classes)} classes, and a sample with the target {beyond[0]}; targets "
                    f"go from 0 to {len(task.classes) - 1}."
                )
        return parts

    @property
    def unit(self) -> str:
        """The unit in which runs are measured: "%" for accuracy, or that of the loss, where there are no classes."""
        if self.dataset.predicts_bytes:
            return "bits per byte"
        return "%" if self.dataset.likelihood.has_labels else self.dataset.likelihood.unit

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


_PARTS = ("train", "validation", "test")


def _integers(values: Any, what: str) -> Indices:
    """Return a row of integers as int64."""
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise BecameError(f"{what} are {array.dtype}; they must be integers.")
    return array.astype(np.int64, copy=False)


def chunks(indices: Indices, size: int) -> list[Indices]:
    """Return indices in order, so many at a time; the last ones may be fewer, but one is never left alone.

    A single last one comes with those before it: a layer that normalises by the statistics of its batch has none of a
    single sample. For the same reason chunks have at least two, even if ``size`` is 1.

    Examples:
        >>> [len(rows) for rows in chunks(np.arange(9), 4)]
        [4, 5]
        >>> [len(rows) for rows in chunks(np.arange(5), 1)]
        [2, 3]
    """
    starts = list(range(0, len(indices), max(size, 2)))
    if len(starts) > 1 and len(indices) - starts[-1] == 1:
        starts.pop()
    return [indices[start:end] for start, end in zip(starts, [*starts[1:], len(indices)], strict=True)]


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
