"""A catalogue of data sets that must be learned from: what each adapter makes of them, against NumPy in float64.

Those that are refused, framework or none, are in ``tests/core/continual/test_data.py``. To add one, add a row to
``STREAMS``; all have few samples, and most have images [2, 4, 4], so that little is compiled.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from adapters.networks import Architecture, Embedding, Flatten, Linear, Tanh
from became_core.continual import (
    Annealed,
    Dataset,
    Learner,
    Task,
    TaskStream,
    Training,
    build_method,
    learn,
    permute_pixels,
    split_classes,
    split_domains,
)
from became_core.curvature import Gaussian
from tests.backends import to_numpy
from tests.streams import text_stream

__all__ = ["LEARNED", "STREAMS", "check_it_is_learned", "check_logits"]

LABELS = np.tile(np.arange(4), 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 2, 4, 4), dtype=np.uint8)
NUMBERS = PIXELS / 255


def data_set(images: Any = PIXELS, labels: Any = LABELS, mean: Any = 0.5, std: Any = 0.3, **fields: Any) -> Dataset:
    """Return a data set of four classes, three quarters of whose rows are for training."""
    channels = np.shape(images)[1]
    means, deviations = (tuple(np.broadcast_to(value, channels).tolist()) for value in (mean, std))
    return Dataset("small", images, labels, 24, means, deviations, **fields)


def split(dataset: Dataset, **options: Any) -> TaskStream:
    return split_classes(dataset, 2, **({"validation": 0.0} | options))


def classes_by_task(*sizes: int) -> TaskStream:
    """Return tasks with these numbers of classes."""
    dataset, first, tasks, targets = data_set(), 0, [], LABELS.copy()
    for index, size in enumerate(sizes):
        rows = np.flatnonzero((first <= LABELS) & (first + size > LABELS))
        targets[rows] -= first
        parts = rows[rows < 24], rows[:0], rows[rows >= 24]
        tasks.append(Task(index, tuple(range(first, first + size)), *parts))
        first += size
    return TaskStream(dataset, tuple(tasks), targets)


def with_rows(stream: TaskStream, part: str, rows: Any) -> TaskStream:
    """Return a stream whose first task has these rows in one part."""
    return replace(stream, tasks=(replace(stream.tasks[0], **{part: rows}), *stream.tasks[1:]))


def read_only(images: Any) -> Any:
    images = images.copy()
    images.flags.writeable = False
    return images


TABLE = (100 * np.random.default_rng(1).normal(size=(32, 5)) + 1000).astype(np.float32)
TARGETS = np.random.default_rng(2).normal(size=(32, 2))
DOMAINS = np.tile([0, 1], 16)
STATISTICS = {"mean": TABLE.mean(0), "std": TABLE.std(0)}

STREAMS: dict[str, Callable[[], TaskStream]] = {
    "pixels": lambda: split(data_set()),
    "float32 in [0, 1]": lambda: split(data_set(NUMBERS.astype(np.float32))),
    "float64 in [0, 1]": lambda: split(data_set(NUMBERS)),
    "float16": lambda: split(data_set(NUMBERS.astype(np.float16))),
    "floats around 0": lambda: split(data_set((NUMBERS - 0.5) / 0.3, mean=0.0, std=1.0)),
    "floats around a thousand": lambda: split(data_set(1000 + 50 * NUMBERS, mean=1025.0, std=15.0)),
    "floats of the other byte order": lambda: split(data_set(NUMBERS.astype(">f4"))),
    "statistics by channel": lambda: split(data_set(mean=(0.2, 0.7), std=(0.1, 0.5))),
    "one channel": lambda: split(data_set(PIXELS[:, :1])),
    "a channel that is constant": lambda: split(data_set(PIXELS * np.array([1, 0], np.uint8)[:, None, None])),
    "images that are not square": lambda: split(data_set(PIXELS[:, :, :3])),
    "channels last, moved": lambda: split(data_set(np.moveaxis(np.moveaxis(PIXELS, 1, -1).copy(), -1, 1))),
    "images upside down": lambda: split(data_set(PIXELS[:, :, ::-1])),
    "every other row": lambda: split(data_set(PIXELS.repeat(2, axis=0)[::2])),
    "in Fortran's order": lambda: split(data_set(np.asfortranarray(PIXELS))),
    "read-only": lambda: split(data_set(read_only(PIXELS))),
    "nested lists": lambda: split(data_set(NUMBERS.tolist(), LABELS.tolist())),
    "int32 labels": lambda: split(data_set(labels=LABELS.astype(np.int32))),
    "uint8 labels": lambda: split(data_set(labels=LABELS.astype(np.uint8))),
    "more classes later": lambda: classes_by_task(1, 3),
    "fewer classes later": lambda: classes_by_task(3, 1),
    "two classes, then one and one": lambda: classes_by_task(2, 1, 1),
    "a class order": lambda: split(data_set(), class_order=[3, 0, 2, 1]),
    "a drawn class order": lambda: split(data_set(), class_order="seeded"),
    "half for validation": lambda: split(data_set(), validation=0.5),
    "permuted pixels": lambda: split(permute_pixels(data_set(), 2)),
    "a last batch of one": lambda: with_rows(split(data_set()), "train", [0, 4, 5, 8, 9, 12, 13, 16, 17]),
    "one training row": lambda: with_rows(split(data_set()), "train", [4]),
    "one test row": lambda: with_rows(split(data_set()), "test", [28]),
    "rows twice": lambda: with_rows(split(data_set()), "train", [4, 4, 5, 5]),
    "rows in any order": lambda: with_rows(split(data_set()), "train", [17, 4, 12, 0]),
    "a table": lambda: split(data_set(TABLE[:, :, None, None], **STATISTICS)),
    "a table with numbers for targets": lambda: split_domains(
        data_set(TABLE[:, :, None, None], TARGETS, **STATISTICS, likelihood=Gaussian(noise=0.5), domains=DOMAINS),
        validation=0.0,
    ),
    "domains with one head": lambda: split_domains(data_set(domains=DOMAINS), validation=0.0),
    "domains with a head each": lambda: split_domains(data_set(domains=DOMAINS), validation=0.0, shared_head=False),
    "text": lambda: text_stream(tasks=2, samples=8, length=4),
}

# Those whose runs differ in more than their numbers; on backends that compile, each takes seconds.
LEARNED = (
    "float32 in [0, 1]",
    "more classes later",
    "fewer classes later",
    "a last batch of one",
    "one test row",
    "a table with numbers for targets",
)

# (backbone, stream) -> a learner.
MakeLearner = Callable[[Any, TaskStream], Learner]


def backbone_for(stream: TaskStream) -> Architecture:
    if stream.dataset.is_text:
        return Architecture((Embedding("tokens", 256, 5), Tanh()), stream.dataset.images.shape[1:])
    return Architecture((Flatten(), Linear("fc1", 5), Tanh()), stream.dataset.images.shape[1:])


def check_logits(make: MakeLearner, name: str) -> None:
    """The logits of all heads are those of the images as they are, normalised by their statistics; so are targets."""
    stream = STREAMS[name]()
    dataset, learner = stream.dataset, make(backbone_for(stream), stream)
    rows = np.arange(len(dataset.images))[::3]
    theta = {key: to_numpy(value).astype(np.float64) for key, value in learner.parameters().items()}
    heads = ["head"] if stream.shared_head else [f"heads.{task.index}" for task in stream.tasks]
    if dataset.is_text:
        features = np.tanh(theta["tokens.weight"][dataset.images[rows]])
    else:
        mean, std = (np.asarray(part, np.float64)[:, None, None] * dataset.unit for part in (dataset.mean, dataset.std))
        normalised = (np.asarray(dataset.images[rows], np.float64) - mean) / std
        features = np.tanh(normalised.reshape(len(rows), -1) @ theta["fc1.weight"].T)
    ours = to_numpy(learner.logits(rows, 5))
    assert ours.shape[:2] == (len(rows), len(heads))
    for place, head in enumerate(heads):
        expected = features @ theta[f"{head}.weight"].T
        width = expected.shape[-1]
        np.testing.assert_allclose(ours[:, place, ..., :width], expected, rtol=1e-4, atol=1e-5)
        assert np.isneginf(ours[:, place, ..., width:]).all()
    np.testing.assert_allclose(to_numpy(learner.targets(rows)), stream.targets[rows], rtol=1e-6)


def check_it_is_learned(make: MakeLearner, name: str) -> None:
    """A run ends with scores of every task, and with all its weights finite and moved."""
    stream = STREAMS[name]()
    learner = make(backbone_for(stream), stream)
    before = {key: to_numpy(value) for key, value in learner.parameters().items()}
    record = learn(learner, stream, build_method("became"), Training(Annealed(0.1, 2), Annealed(0.1, 1), batch_size=4))
    assert np.isfinite((record.accuracy if stream.dataset.likelihood.has_labels else record.loss)[-1]).all()
    one_class = {f"heads.{task.index}.weight" for task in stream.tasks if len(task.classes) == 1}
    for key, value in learner.parameters().items():
        assert np.isfinite(to_numpy(value)).all()
        # There is nothing to learn where one class is certain.
        assert np.array_equal(to_numpy(value), before[key]) == (key in one_class)
