"""What a run is given, as plain values: two runs of equal settings are the same run.

Convention: settings are flat, by dotted names (``training.stage1.lr``).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any

import numpy as np

from became_core.continual import Dataset, Method, TaskStream, Training

__all__ = ["describe", "difference", "fingerprint"]


def describe(stream: TaskStream, method: Method, training: Training, seed: int) -> dict[str, Any]:
    """Return the settings of a run: what its result depends on, the network, the backend and versions aside."""
    tasks = {
        str(task.index + 1): {
            "classes": list(task.classes),
            "train": _digest(task.train),
            "validation": _digest(task.validation),
            "test": _digest(task.test),
        }
        for task in stream.tasks
    }
    found: dict[str, Any] = {}
    parts = {"seed": seed, "data": fingerprint(stream.dataset), "method": method, "training": training, "task": tasks}
    for name, part in parts.items():
        _flatten(name, part, found)
    return dict(json.loads(json.dumps(found)))  # as they come back from a file: tuples are lists there


def fingerprint(dataset: Dataset) -> str:
    """Return a digest of a data set: of all that a learner sees of it."""
    sizes = repr((dataset.images.shape, dataset.train_size, dataset.mean, dataset.std)).encode()
    return _digest(sizes, dataset.images, dataset.labels)


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first name whose values differ, and the two values; None for what is not there."""
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            return name, theirs.get(name), ours.get(name)
    return None


def _digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return found.hexdigest()[:16]


def _flatten(name: str, value: Any, found: dict[str, Any]) -> None:
    if is_dataclass(value) and not isinstance(value, type):
        found[name] = type(value).__name__
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping):
        for key, each in value.items():
            _flatten(f"{name}.{key}", each, found)
    elif isinstance(value, float) and not math.isfinite(value):
        found[name] = str(value)
    elif isinstance(value, str | int | float | list | tuple | NoneType):
        found[name] = value
    else:
        found[name] = getattr(value, "__qualname__", type(value).__name__)
