"""One task's head among all: what belongs to it goes by the name ``head``, so that what is compiled serves every task.

Convention: values are dictionaries by parameter name, and frozen dataclasses that hold such, as optimisers and
posteriors are; an entry ``heads.3.weight`` is the head of task 3.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

__all__ = ["HEAD", "for_task", "head_of", "put_back"]

HEAD = "head"

T = TypeVar("T")


def head_of(task: int) -> str:
    """Return the canonical name of a task's head."""
    return f"heads.{task}"


def for_task(value: T, task: int) -> T:
    """Return a value with the task's head called ``head``, and without the heads of others."""
    own = f"{head_of(task)}."

    def renamed(name: str) -> str | None:
        if name.startswith(own):
            return f"{HEAD}.{name.removeprefix(own)}"
        return None if name.startswith("heads.") else name

    return _with_names(value, renamed)


def put_back(value: T, part: T, task: int) -> T:
    """Return a value with its part for a task put back in place: what ``for_task`` gave, as it has become since."""
    own = f"{HEAD}."

    def renamed(name: str) -> str:
        return f"{head_of(task)}.{name.removeprefix(own)}" if name.startswith(own) else name

    return _merged(value, _with_names(part, renamed))


def _with_names(value: T, renamed: Callable[[str], str | None]) -> T:
    """Return a value with other names; entries without one are left out."""
    if isinstance(value, dict):
        names = {name: renamed(name) for name in value}
        return {new: _with_names(value[old], renamed) for old, new in names.items() if new is not None}  # type: ignore[return-value]
    return _by_field(value, lambda name: _with_names(getattr(value, name), renamed))


def _merged(value: T, part: T) -> T:
    if isinstance(value, dict) and isinstance(part, dict):
        return {**value, **part}  # type: ignore[return-value]
    return _by_field(part, lambda name: _merged(getattr(value, name), getattr(part, name)))


def _by_field(value: T, changed: Callable[[str], object]) -> T:
    if not is_dataclass(value):
        return value
    return replace(value, **{each.name: changed(each.name) for each in fields(value)})  # type: ignore[type-var]
