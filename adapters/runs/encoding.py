"""The state of a run as plain values for JSON and named arrays, and back, for any framework's arrays.

Convention: an array is named by its place in the state (``theta.conv1.weight``, ``memory.posterior.mean.conv1.weight``)
and is "array" among the plain values. A dataclass is an object of its fields, with the name of its class as ``kind``. A
float that JSON has no number for is "inf", "-inf" or "nan".

The declared types of ``RunState`` and of its parts decide what is read, never the file. The file may only choose among
the members of a union and among the subclasses of an abstract type, such as ``Precision`` or ``Region``; so those of
other packages are read as well. A projector's memory is what ``to_arrays`` returns; its settings are the method's.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Array, is_array, on_host
from became_core.continual import RunState
from became_core.projection import Projector

__all__ = ["MisfitError", "concrete_classes", "decoded", "encoded"]

HostArrays = dict[str, NDArray[Any]]

NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class MisfitError(ValueError):
    """What was read is not the state of a run; the message is a clause that names the place."""


def encoded(state: RunState) -> tuple[dict[str, Any], HostArrays]:
    """Return a state as plain values and arrays."""
    arrays: HostArrays = {}
    return _plain(state, "", arrays), arrays


def decoded(
    plain: Any, arrays: Mapping[str, NDArray[Any]], projector: Projector | None, make: Callable[[NDArray[Any]], Array]
) -> RunState:
    """Return the state that ``encoded`` was given.

    Args:
        plain: the plain values of the state.
        arrays: the arrays of the state.
        projector: the projector of the method that runs; its memory does not matter.
        make: turns a NumPy array, which nothing else refers to, into an array of the framework of the run.

    Raises:
        MisfitError: if this is not the state of a run, or the state of another method.
        BecameError: if a part of the state does not fit another part.
    """
    reader = _Reader(arrays, projector, make)
    try:
        state: RunState = reader.read(RunState, plain, "")
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
    ) as error:  # of constructors, given what no run gave
        raise MisfitError(f"{type(error).__name__}: {error}") from None
    for name in arrays:
        if name not in reader.taken:
            raise MisfitError(f"nothing asks for the array '{name}'")
    return state


def _plain(value: Any, path: str, arrays: HostArrays) -> Any:
    if is_array(value):
        # A copy in the order of the axes, whatever the framework's layout.
        arrays[path] = np.array(on_host(value), order="C")
        return "array"
    if isinstance(value, list | tuple):
        return [_plain(part, _at(path, index), arrays) for index, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    parts = _parts(value)
    if parts is None:
        return value
    kind = {"kind": type(value).__name__} if is_dataclass(value) else {}
    return kind | {str(name): _plain(part, _at(path, name), arrays) for name, part in parts.items()}


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Return the parts of a value by name; None if it has no parts."""
    if hasattr(value, "to_arrays"):
        return cast(Mapping[Any, Any], value.to_arrays())
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return value if isinstance(value, Mapping) else None


def _at(path: str, entry: object) -> str:
    return f"{path}.{entry}" if path else str(entry)


@dataclass(frozen=True)
class _Reader:
    """Reads values by their declared types, and notes which arrays were read."""

    arrays: Mapping[str, NDArray[Any]]
    projector: Projector | None
    make: Callable[[NDArray[Any]], Array]
    taken: set[str] = field(default_factory=set)

    def read(self, hint: Any, plain: Any, path: str) -> Any:
        """Return the value of a declared type at a place."""
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any or origin is np.ndarray:
            array = self.array(plain, path)
            return self.make(array) if hint is Any else array
        if hint is Projector:
            return self.with_memory(plain, path)
        if inspect.isabstract(hint) or origin in (Union, UnionType):
            return self.one_of(arguments or concrete_classes(hint), plain, path)
        if isinstance(hint, type) and is_dataclass(hint):
            return self.record(hint, plain, path)
        if origin is not None:
            return self.container(origin, arguments, plain, path)
        return _scalar(hint, plain, path)

    def array(self, plain: Any, path: str) -> NDArray[Any]:
        """Return a copy of the array at a place."""
        if plain != "array" or path not in self.arrays:
            raise MisfitError(f"there is no array '{path}'")
        self.taken.add(path)
        return np.array(self.arrays[path])

    def one_of(self, candidates: tuple[Any, ...], plain: Any, path: str) -> Any:
        """Return the value of one of several types."""
        if plain is None and NoneType in candidates:
            return None
        candidates = tuple(kind for kind in candidates if kind is not NoneType)
        if len(candidates) > 1:
            kind = plain.get("kind") if isinstance(plain, dict) else None
            candidates = tuple(candidate for candidate in candidates if candidate.__name__ == kind)
        if not candidates:
            raise MisfitError(f"'{path}' is of an unknown kind")
        return self.read(candidates[0], plain, path)

    def record(self, hint: type, plain: Any, path: str) -> Any:
        """Return a dataclass."""
        hints = get_type_hints(hint)
        names = [each.name for each in fields(hint)]
        # Earlier versions did not save what is later; it then has its default.
        later = {each.name for each in fields(hint) if each.metadata.get("later")}
        if isinstance(plain, dict):
            names = [name for name in names if name in plain or name not in later]
        if not isinstance(plain, dict) or set(plain) != {"kind", *names} or plain["kind"] != hint.__name__:
            raise MisfitError(f"'{path}' is not a {hint.__name__}")
        return hint(**{name: self.read(hints[name], plain[name], _at(path, name)) for name in names})

    def with_memory(self, plain: Any, path: str) -> Projector:
        """Return the method's projector with the memory at a place."""
        if self.projector is None or not isinstance(plain, dict) or plain.get("kind") != type(self.projector).__name__:
            raise MisfitError(f"'{path}' is not the memory of the method's projector")
        return self.projector.with_arrays(
            {name: self.read(Any, value, _at(path, name)) for name, value in plain.items() if name != "kind"}
        )

    def container(self, origin: Any, arguments: tuple[Any, ...], plain: Any, path: str) -> Any:
        """Return a list, a tuple or a mapping."""
        if origin in (list, tuple):
            return self.sequence(origin, arguments, plain, path)
        return self.mapping(arguments, plain, path)

    def sequence(self, origin: type, arguments: tuple[Any, ...], plain: Any, path: str) -> Any:
        """Return a list, or a tuple of one type throughout or of a type for each entry."""
        if not isinstance(plain, list):
            raise MisfitError(f"'{path}' is not a list")
        alike = origin is list or arguments[1:] == (...,)
        hints = [arguments[0]] * len(plain) if alike else list(arguments)
        if len(hints) != len(plain):
            raise MisfitError(f"'{path}' has {len(plain)} entries, not {len(hints)}")
        pairs = zip(hints, plain, strict=True)
        return origin(self.read(part, value, _at(path, n)) for n, (part, value) in enumerate(pairs))

    def mapping(self, arguments: tuple[Any, ...], plain: Any, path: str) -> dict[Any, Any]:
        """Return a mapping from names or numbers."""
        key, hint = arguments
        if not isinstance(plain, dict) or (key is int and not all(name.isdecimal() for name in plain)):
            raise MisfitError(f"'{path}' is not a mapping")
        return {key(name): self.read(hint, value, _at(path, name)) for name, value in plain.items()}


def concrete_classes(abstract: Any) -> tuple[type, ...]:
    """Return all subclasses of an abstract class that are not abstract themselves."""
    classes: list[type] = []
    for subclass in abstract.__subclasses__():
        classes += [*([] if inspect.isabstract(subclass) else [subclass]), *concrete_classes(subclass)]
    return tuple(dict.fromkeys(classes))


def _scalar(hint: Any, plain: Any, path: str) -> Any:
    if hint is float and isinstance(plain, str) and plain in NUMBERS:
        return NUMBERS[plain]
    if type(plain) is hint or (hint is float and type(plain) is int):
        return plain
    raise MisfitError(f"'{path}' is not a {hint.__name__}")
