"""What a checkpoint belongs to, as plain values: a run goes on only from a checkpoint of equal values.

Convention: the values are flat, by dotted names (``training.stage1.lr``).
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any

from adapters.runs.files import digest
from became_core.continual import Dataset, Method, TaskStream, Training

__all__ = ["describe", "difference", "fingerprint", "is_of"]


def describe(stream: TaskStream, method: Method, training: Training, seed: int) -> dict[str, Any]:
    """Return what the result of a run depends on, without the network, the backend and the versions."""
    tasks = {
        str(task.index + 1): {
            "classes": list(task.classes),
            "train": _digest(task.train),
            "validation": _digest(task.validation),
            "test": _digest(task.test),
            **{
                part: _digest(getattr(task, part))
                for part in ("reservoir", "curvature")
                if getattr(task, part) is not None
            },
        }
        for task in stream.tasks
    }
    parts = {"seed": seed, "data": _fingerprint(stream.dataset), "method": method, "training": training, "task": tasks}
    flat = dict(_flattened(parts)) | ({"shared_head": True} if stream.shared_head else {})
    return dict(json.loads(json.dumps(flat)))  # as a file gives it back: tuples are lists


def fingerprint(dataset: Dataset) -> str:
    """Return a digest of all that a learner sees of a data set, but for the views that a seed has drawn of its rows."""
    return _fingerprint(dataset, len(dataset.images) - dataset.copies)


def is_of(recorded: str, dataset: Dataset) -> bool:
    """Whether a run's record has the digest of a data set; the digest of an earlier version includes the views."""
    return recorded == fingerprint(dataset) or (dataset.copies > 0 and recorded == _fingerprint(dataset))


def _fingerprint(dataset: Dataset, rows: int | None = None) -> str:
    images, labels = dataset.images[:rows], dataset.labels[:rows]
    sizes = repr((images.shape, dataset.train_size, dataset.mean, dataset.std)).encode()
    domains = () if dataset.domains is None else (repr(dataset.likelihood).encode(), dataset.domains[:rows])
    return _digest(sizes, images, labels, *domains)


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first name whose values differ, and both values, None for a missing one; None if all are equal."""
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            return name, theirs.get(name), ours.get(name)
    return None


def _digest(*parts: Any) -> str:
    return digest(*parts)[:16]


def _flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested mappings and dataclasses as dotted names with plain values; a dataclass's own value is its class."""
    if is_dataclass(value) and not isinstance(value, type):
        yield name, type(value).__name__
        # What earlier versions did not have is left out where it is as usual, so that their runs go on.
        value = {
            field.name: getattr(value, field.name)
            for field in fields(value)
            if not (field.metadata.get("later") and getattr(value, field.name) == field.default)
        }
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flattened(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, str(value)
    elif isinstance(value, str | int | float | list | tuple | NoneType):
        yield name, value
    else:
        yield name, getattr(value, "__qualname__", type(value).__name__)
