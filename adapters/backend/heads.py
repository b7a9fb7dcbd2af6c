"""One task's head among all: within a step it is called ``head``, so that what is compiled serves every task.

Convention: the head of task 3 has the parameter ``heads.3.weight``. A network may have layers of these names itself;
then those of the heads get underscores, and the network keeps its own. A value is a dictionary by parameter name, a set
of names, or a frozen dataclass or tuple that holds such, as constraints, optimisers and posteriors do.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, TypeVar

from became_core.continual import Constraint

__all__ = ["Heads"]

T = TypeVar("T")


@dataclass(frozen=True)
class Heads:
    """The names of a network's heads.

    Attributes:
        suffix: underscores that tell them from the network's own layers.
        shared: whether all tasks have one head, which is called ``head`` everywhere and is no task's own.
    """

    suffix: str = ""
    shared: bool = False

    @classmethod
    def beside(cls, names: Iterable[str], *, shared: bool = False) -> Self:
        """Return names that no parameter of a network has.

        Args:
            names: of all parameters of the network.
            shared: whether all tasks have one head.

        Examples:
            >>> Heads.beside(["fc.weight"]).name(3), Heads.beside(["heads.0.weight", "head_.bias"]).name(3)
            ('heads.3', 'heads__.3')
        """
        taken = {name.split(".")[0] for name in names}
        suffix = ""
        while taken & {f"heads{suffix}", f"head{suffix}"}:
            suffix += "_"
        return cls(suffix, shared)

    @property
    def one(self) -> str:
        """The name of the task's head within a step."""
        return f"head{self.suffix}"

    def name(self, task: int) -> str:
        """Return the canonical name of a task's head."""
        return self.one if self.shared else f"heads{self.suffix}.{task}"

    def has(self, name: str) -> bool:
        """Return whether a parameter of this name is that of a head that is a task's own."""
        return not self.shared and name.startswith(f"heads{self.suffix}.")

    def for_task(self, value: T, task: int) -> T:
        """Return a value with the task's head called ``head``, and without the heads of other tasks.

        A projector is left as it is: it remembers shared parameters alone.

        >>> Heads().for_task({"fc.weight": 1, "heads.0.weight": 2, "heads.3.weight": 3}, 3)
        {'fc.weight': 1, 'head.weight': 3}
        """
        own = f"{self.name(task)}."

        def renamed(name: str) -> str | None:
            if name.startswith(own):
                return f"{self.one}.{name.removeprefix(own)}"
            return None if self.has(name) else name

        if isinstance(value, Constraint):
            rest: Constraint = _renamed(replace(value, projector=None), renamed)
            return replace(rest, projector=value.projector)  # type: ignore[return-value] # a constraint is T here
        part: T = _renamed(value, renamed)
        return part

    def put_back(self, value: T, part: T, task: int) -> T:
        """Return a value in which a part, made by ``for_task`` and changed since, takes its old place again.

        >>> Heads().put_back({"fc.weight": 1, "heads.3.weight": 3}, {"fc.weight": 5, "head.weight": 7}, 3)
        {'fc.weight': 5, 'heads.3.weight': 7}
        """
        own = f"{self.one}."

        def renamed(name: str) -> str:
            return f"{self.name(task)}.{name.removeprefix(own)}" if name.startswith(own) else name

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
