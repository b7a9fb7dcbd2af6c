"""Catalogues of named values, and registries, which are catalogues of classes with settings.

A registered class is a dataclass. Its fields that are made by ``setting`` are its settings, which a user may choose.
Every setting has an option name, which is the name of the field unless another is given. The help of a setting is the
entry of its field under ``Attributes:`` in the docstring of the class. Several classes may share an option if its type
and its default are the same.

Other packages add entries to a catalogue or a registry by an entry point of its group:

    [project.entry-points."became.projectors"]
    leading = "my_package.leading:Leading"
"""

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, get_type_hints

from became_core.errors import BecameError, first_line

__all__ = ["Catalogue", "Registry", "Setting", "nearest", "setting"]

T = TypeVar("T")
OPTION = "option"

# A name is a part of folders' names, and a plus joins those of a method and a projector.
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def setting(default: Any, *, option: str | None = None) -> Any:
    """Return a dataclass field that is a setting: a number or a word that a user may choose.

    The field is static: for the transforms of a framework it is a part of the structure of the value, never an array.

    Args:
        default: its value if the user chooses none.
        option: its option name; None for the name of the field.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Example:
        ...     strength: float = setting(1.0, option="example_strength")
        >>> Registry("example.group", "example", {"example": Example}).build("example", {"example_strength": 2.0})
        Example(strength=2.0)
    """
    return field(default=default, metadata={"static": True, OPTION: option or ""})


@dataclass(frozen=True)
class Setting:
    """A description of a number or a word that a user may choose.

    Attributes:
        option: its option name, such as ``ewc_strength``.
        type: the annotation of its field, such as ``float`` or ``Literal["model", "layer"]``.
        default: its value if the user chooses none.
        help: the entry of its field in the docstring of the class that declares it, as one paragraph.
        owners: the registered names of the classes that have it.
    """

    option: str
    type: Any
    default: Any
    help: str
    owners: tuple[str, ...]

    def shared_with(self, other: "Setting") -> "Setting":
        """Return the setting of the owners of this setting and of another one with the same option.

        Raises:
            BecameError: if the settings differ in type or default.
        """
        if (self.type, self.default) != (other.type, other.default):
            raise BecameError(
                f"'{other.owners[0]}' and '{self.owners[0]}' share the option '{self.option}' and differ in its type "
                "or default; give one of them an option name of its own."
            )
        return replace(self, owners=(*self.owners, *other.owners))


class Catalogue(Generic[T]):
    """Values by name, to which other packages can add their own by entry points.

    Examples:
        >>> numbers = Catalogue("example.group", "number", {"one": 1, "two": 2})
        >>> numbers["two"], list(numbers)
        (2, ['one', 'two'])
    """

    def __init__(self, group: str, kind: str, values: Mapping[str, T]) -> None:
        """Store the values of this package.

        Args:
            group: the group of the entry points by which other packages add values, such as ``became.benchmarks``.
            kind: the word for a value in messages, such as "benchmark".
            values: the values, by name.
        """
        self.group, self.kind = group, kind
        self._values = dict(values)
        self._entry_points_are_loaded = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all values: first those of this package, then those of other packages."""
        if not self._entry_points_are_loaded:
            self._entry_points_are_loaded = True  # since what is registered may be asked for its settings
            try:
                for entry in entry_points(group=self.group):
                    if entry.name not in self._values:
                        self.register(entry.name, self._loaded(entry))
            except BaseException:
                self._entry_points_are_loaded = False
                raise
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
            BecameError: if there is no such name; the message has the nearest name, and all names.
        """
        self._check_known(name)
        return self._values[name]

    def register(self, name: str, value: T) -> None:
        """Add a value, or replace the value of that name.

        Raises:
            BecameError: if the name cannot be that of a folder, or has a plus, which joins names.
        """
        self._check_name(name)
        self._values[name] = value

    def remove(self, name: str) -> None:
        """Take an entry out again.

        Raises:
            BecameError: if there is no entry of that name.
        """
        self._check_known(name)
        del self._values[name]

    def _loaded(self, entry: EntryPoint) -> T:
        """Return the value of an entry point.

        Raises:
            BecameError: if its package cannot be loaded, or has no such value.
        """
        try:
            value: T = entry.load()
        except Exception as error:
            raise BecameError(
                f"the {self.kind} '{entry.name}' of another package, {entry.value}, cannot be loaded "
                f"({first_line(error)}); mend that package, or uninstall it."
            ) from error
        return value

    def _check_name(self, name: str) -> None:
        if not re.fullmatch(NAME, name):
            raise BecameError(
                f"the name '{name}' cannot be that of a {self.kind}; give letters, digits, points, hyphens and "
                "underscores, and begin with a letter or a digit."
            )

    def _check_known(self, name: str) -> None:
        if name not in self:
            raise BecameError(f"there is no {self.kind} '{name}'{nearest(name, self.names)}.")

    def summary(self, name: str) -> str:
        """Return the first line of a value's docstring, without its full stop."""
        return (inspect.getdoc(self[name]) or "").partition("\n")[0].removesuffix(".")


class Registry(Catalogue[type[T]]):
    """Classes by name, whose fields made by ``setting`` are settings.

    Examples:
        >>> from became_core.projection import PROJECTORS
        >>> PROJECTORS["gpm"].__name__, PROJECTORS.build("gpm", {"threshold": 0.9}).threshold
        ('GPM', 0.9)
    """

    def register(self, name: str, value: type[T]) -> None:
        """Add a class, or replace the class of that name.

        Raises:
            BecameError: if it shares an option with another class and they differ in the option's type or default, or
                as ``Catalogue.register`` does.
        """
        self._check_name(name)
        before = {known: self._values[known] for known in self.names}
        self._values[name] = value
        try:
            self.settings()
        except BecameError:
            self._values = before
            raise

    def build(self, name: str, values: Mapping[str, Any]) -> T:
        """Return an instance of a class, built with those values that belong to its settings.

        Args:
            name: the registered name of the class.
            values: by option name; those of other classes have no effect.

        Raises:
            BecameError: if there is no such name, a value is infinite or not a number, or the class cannot use it.
        """
        cls = self[name]
        for option in _options_of(cls).keys() & values.keys():
            if isinstance(values[option], float) and not math.isfinite(values[option]):
                raise BecameError(f"the setting '{option}' is {values[option]}; it must be a finite number.")
        return cls(**{field: values[option] for option, field in _options_of(cls).items() if option in values})

    def options_of(self, name: str) -> tuple[str, ...]:
        """Return the option names of the settings of a class."""
        return tuple(_options_of(self[name]))

    def settings(self) -> dict[str, Setting]:
        """Return all settings of all classes, by option name.

        Raises:
            BecameError: if two classes share an option, and differ in its type or default.
        """
        merged: dict[str, Setting] = {}
        for name in self.names:
            declared_settings = _declared_settings(self._values[name])  # type: ignore[arg-type] # classes are hashable
            for option, declared in declared_settings.items():
                new = replace(declared, owners=(name,))
                merged[option] = merged[option].shared_with(new) if option in merged else new
        return merged


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name, with the nearest known name, if one is near, and all names.

    Examples:
        >>> "there is no method 'bceame'" + nearest("bceame", ["became", "ewc"])
        "there is no method 'bceame'; did you mean 'became'? Choose from became, ewc"
    """
    known = sorted(names)
    near = difflib.get_close_matches(name, known)
    near.sort(key=lambda candidate: candidate[:1] != name[:1])  # Prefer a name with the same first letter.
    hint = f"; did you mean '{near[0]}'? Choose from" if near else "; choose from"
    return f"{hint} {', '.join(known)}"


def _options_of(cls: type) -> dict[str, str]:
    """Return the names of the fields of a dataclass that are settings, by option name."""
    settings = [field for field in fields(cls) if OPTION in field.metadata and field.default is not MISSING]
    return {field.metadata[OPTION] or field.name: field.name for field in settings}


@cache  # every command asks for all settings many times, and reading annotations and docstrings takes milliseconds
def _declared_settings(cls: type) -> dict[str, Setting]:
    """Return the settings that a class declares, by option name, before it has a registered name."""
    hints = get_type_hints(cls)
    defaults = {attribute.name: attribute.default for attribute in fields(cls)}
    return {
        option: Setting(option, hints[name], defaults[name], _help(cls, name), ())
        for option, name in _options_of(cls).items()
    }


def _help(cls: type, field_name: str) -> str:
    """Return the entry of a field under ``Attributes:`` in the docstring of the class that declares it."""
    for owner in cls.__mro__:
        if field_name in vars(owner).get("__annotations__", {}):
            _, _, attributes = (inspect.getdoc(owner) or "").partition("Attributes:\n")
            entry = re.search(rf"^    {field_name}: (.*(?:\n     +.*)*)", attributes, re.MULTILINE)
            return " ".join(entry[1].split()) if entry else ""
    return ""
