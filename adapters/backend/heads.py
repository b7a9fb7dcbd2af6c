"""One task's head among all: within a step it is called ``head``, so that what is compiled serves every task.

Convention: the head of task 3 has the parameter ``heads.3.weight``. A value is a dictionary by parameter name, a set of
names, or a frozen dataclass or tuple that holds such, as constraints, optimisers and posteriors do.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from became_core.continual import Constraint

__all__ = ["HEAD", "for_task", "head_name", "put_back"]

HEAD = "head"

T = TypeVar("T")


def head_name(task: int) -> str:
    """Return the canonical name of a task's head."""
    return f"heads.{task}"


def for_task(value: T, task: int) -> T:
    """Return a value with the task's head called ``head``, and without the heads of other tasks.

    A projector is left as it is: it remembers shared parameters alone.

    >>> for_task({"fc.weight": 1, "heads.0.weight": 2, "heads.3.weight": 3}, 3)
    {'fc.weight': 1, 'head.weight': 3}
    """
    own = f"{head_name(task)}."

    def renamed(name: str) -> str | None:
        if name.startswith(own):
            return f"{HEAD}.{name.removeprefix(own)}"
        return None if name.startswith("heads.") else name

    if isinstance(value, Constraint):
        rest: Constraint = _renamed(replace(value, projector=None), renamed)
        return replace(rest, projector=value.projector)  # type: ignore[return-value] # a constraint is T here
    part: T = _renamed(value, renamed)
    return part


def put_back(value: T, part: T, task: int) -> T:
    """Return a value in which a part, made by ``for_task`` and changed since, takes its old place again.

    >>> put_back({"fc.weight": 1, "heads.3.weight": 3}, {"fc.weight": 5, "head.weight": 7}, 3)
    {'fc.weight': 5, 'heads.3.weight': 7}
    """
    own = f"{HEAD}."

    def renamed(name: str) -> str:
        return f"{head_name(task)}.{name.removeprefix(own)}" if name.startswith(own) else name

    whole: T = _merged(value, _renamed(part, renamed))
    return whole


def _renamed(value: Any, new_name: Callable[[str], str | None]) -> Any:
    """Return a value with other names; entries without one are left out."""
    if isinstance(value, dict):
        names = {name: new_name(name) for name in value}
        return {new: _renamed(value[old], new_name) for old, new in names.items() if new is not None}
    if isinstance(value, frozenset):
        return frozenset(new for new in map(new_name, value) if new is not None)
    if type(value) is tuple:
        return tuple(_renamed(item, new_name) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{field.name: _renamed(getattr(value, field.name), new_name) for field in fields(value)})


def _merged(value: Any, part: Any) -> Any:
    """Return a value with the entries of a part in place of its own."""
    if isinstance(value, dict):
        return {**value, **part}
    if type(value) is tuple:
        return tuple(_merged(*pair) for pair in zip(value, part, strict=True))
    if not is_dataclass(part) or isinstance(part, type):
        return part
    names = [field.name for field in fields(part)]
    return replace(part, **{name: _merged(getattr(value, name), getattr(part, name)) for name in names})
