"""Catalogues, which are named values, and registries: named classes with the settings that they are built with.

A class that is registered is a dataclass; its fields that are made by ``setting`` are what a user may choose. A setting
has an option name, which is the field's own name unless it gives another, and its help is what the class's docstring
says of the field under ``Attributes:``. Several classes may share an option, if its type and its default are the same.

Other packages add to a registry by an entry point of the registry's group:

    [project.entry-points."became.projectors"]
    leading = "my_package.leading:Leading"
"""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, get_type_hints

from became_core.errors import BecameError

__all__ = ["Catalogue", "Registry", "Setting", "nearest", "setting"]

T = TypeVar("T")
OPTION = "option"


def setting(default: Any, *, option: str | None = None) -> Any:
    """Return a dataclass field for a number or a word that a user may choose.

    The field is static: to a framework's transforms it is a part of the value's structure, never an array.

    Args:
        default: its value where nothing is chosen.
        option: what it is called among all options; the field's own name if not given.
    """
    return field(default=default, metadata={"static": True, OPTION: option or ""})


@dataclass(frozen=True)
class Setting:
    """One thing that a user may choose.

    Attributes:
        option: its name, such as ``ewc_strength``.
        type: its annotation, such as ``float`` or ``Literal["model", "layer"]``.
        default: its value where nothing is chosen.
        help: what the docstring of the class that declares it says of it, as one paragraph.
        owners: the registered names that are built with it.
    """

    option: str
    type: Any
    default: Any
    help: str
    owners: tuple[str, ...]

    def shared_with(self, other: "Setting") -> "Setting":
        """Return the one setting that this and another of the same option are.

        Raises:
            BecameError: if they differ in type or default.
        """
        if (self.type, self.default) != (other.type, other.default):
            raise BecameError(
                f"'{other.owners[0]}' and '{self.owners[0]}' share the option '{self.option}' and differ in its type "
                "or default; give one of them an option name of its own."
            )
        return replace(self, owners=(*self.owners, *other.owners))


class Catalogue(Generic[T]):
    """Values by name, to which other packages add by entry points.

    >>> from adapters.benchmarks.catalogue import BENCHMARKS
    >>> BENCHMARKS["split-mnist"].tasks
    5
    """

    def __init__(self, group: str, kind: str, values: Mapping[str, T]) -> None:
        """Hold the values that this package has.

        Args:
            group: of the entry points by which other packages add theirs, such as ``became.benchmarks``.
            kind: what messages call an entry, such as "benchmark".
            values: by name.
        """
        self.group, self.kind = group, kind
        self._values = dict(values)
        self._entry_points_are_loaded = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all entries, this package's first, then those of other packages."""
        if not self._entry_points_are_loaded:
            self._entry_points_are_loaded = True
            for entry in entry_points(group=self.group):
                self.register(entry.name, entry.load())
        return tuple(self._values)

    def __contains__(self, name: object) -> bool:
        """Return whether a name is registered."""
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.names)

    def __getitem__(self, name: str) -> T:
        """Return the value of a name.

        Raises:
            BecameError: if there is none; the message has the nearest name, and all of them.
        """
        if name not in self:
            raise BecameError(f"there is no {self.kind} '{name}'{nearest(name, self.names)}.")
        return self._values[name]

    def register(self, name: str, value: T) -> None:
        """Add a value, or put it in the place of another one of that name."""
        self._values[name] = value

    def summary(self, name: str) -> str:
        """Return the first line of a value's docstring, without its full stop."""
        return (inspect.getdoc(self[name]) or "").partition("\n")[0].removesuffix(".")


class Registry(Catalogue[type[T]]):
    """Classes by name, whose fields made by ``setting`` are settings.

    >>> from became_core.projection import PROJECTORS
    >>> PROJECTORS["gpm"].__name__, PROJECTORS.build("gpm", {"threshold": 0.9}).threshold
    ('GPM', 0.9)
    """

    def register(self, name: str, value: type[T]) -> None:
        """Add a class, or put it in the place of another one of that name.

        Raises:
            BecameError: if it shares an option with another class and they differ in the option's type or default.
        """
        before = dict(self._values)
        self._values[name] = value
        try:
            self.settings()
        except BecameError:
            self._values = before
            raise

    def build(self, name: str, values: Mapping[str, Any]) -> T:
        """Return an instance built with those of the values, by option name, that are settings of its class.

        Raises:
            BecameError: if there is no such name, or the class cannot use a value.
        """
        cls = self[name]
        return cls(**{field: values[option] for option, field in _options_of(cls).items() if option in values})

    def options_of(self, name: str) -> tuple[str, ...]:
        """Return the option names that a class is built with."""
        return tuple(_options_of(self[name]))

    def settings(self) -> dict[str, Setting]:
        """Return all settings of all classes, by option name.

        Raises:
            BecameError: if two classes share an option, and differ in its type or default.
        """
        merged: dict[str, Setting] = {}
        for name in self.names:
            cls = self._values[name]
            hints, defaults = get_type_hints(cls), {each.name: each.default for each in fields(cls)}  # type: ignore[arg-type]
            for option, field_name in _options_of(cls).items():
                new = Setting(option, hints[field_name], defaults[field_name], _help(cls, field_name), (name,))
                merged[option] = merged[option].shared_with(new) if option in merged else new
        return merged


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one if one is near, and all there are."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known)
    near.sort(key=lambda each: each[:1] != name[:1])  # of names as near as another, one with the same first letter
    hint = f"; did you mean '{near[0]}'? Choose from" if near else "; choose from"
    return f"{hint} {', '.join(known)}"


def _options_of(cls: type) -> dict[str, str]:
    """The fields of a dataclass that are settings, by option name."""
    declared = [each for each in fields(cls) if OPTION in each.metadata and each.default is not MISSING]
    return {each.metadata[OPTION] or each.name: each.name for each in declared}


def _help(cls: type, field_name: str) -> str:
    """What the docstring of the class that declares a field says of it under ``Attributes:``."""
    for owner in cls.__mro__:
        if field_name in vars(owner).get("__annotations__", {}):
            _, _, attributes = (inspect.getdoc(owner) or "").partition("Attributes:\n")
            entry = re.search(rf"^    {field_name}: (.*(?:\n     +.*)*)", attributes, re.MULTILINE)
            return " ".join(entry[1].split()) if entry else ""
    return ""
