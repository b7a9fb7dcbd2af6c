"""The state of a run as plain values for JSON and named arrays, and back, for any framework's arrays.

Convention: an array is named by its place in the state (``theta.conv1.weight``, ``memory.posterior.mean.conv1.weight``)
and stands as "array" among the plain values; a dataclass is an object of its fields, with its class's name as ``kind``;
a float that JSON has no number for is "inf", "-inf" or "nan".

What is read is told by the declared types of ``RunState`` and of what it holds, never by the file: of a union the file
may choose a member, and that is all. A projector is as ``to_arrays`` has it, with the settings of the method's own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Array, is_array, on_host
from became_core.continual import RunState
from became_core.precision import Dense, Diagonal, Isotropic, Kronecker, LowRank, Precision, Sum
from became_core.projection import GatedRegion, Projector, Region, TrustRegion

__all__ = ["MisfitError", "decoded", "encoded"]

HostArrays = dict[str, NDArray[Any]]

# What may stand where the declared type is an abstract one.
ALTERNATIVES: dict[Any, tuple[type, ...]] = {
    Precision: (Dense, Diagonal, Isotropic, Kronecker, LowRank, Sum),
    Region: (GatedRegion, TrustRegion),
}
NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class MisfitError(ValueError):
    """What was read is no state of a run; the message is a clause that names the place."""


def encoded(state: RunState) -> tuple[dict[str, Any], HostArrays]:
    """Return a state as plain values and arrays."""
    arrays: HostArrays = {}
    return _plain(state, "", arrays), arrays


def decoded(
    plain: Any, arrays: Mapping[str, NDArray[Any]], projector: Projector | None, make: Callable[[NDArray[Any]], Array]
) -> RunState:
    """Return the state that ``encoded`` gave.

    Args:
        plain: its plain values.
        arrays: its arrays.
        projector: of the method that runs; its memory does not matter.
        make: from a NumPy array, which is its alone, to one of the framework that the run goes on with.

    Raises:
        MisfitError: if this is no such state, or one of another method's.
        BecameError: if a part of it does not fit another.
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
        return [_plain(each, _at(path, index), arrays) for index, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    parts = _parts(value)
    if parts is None:
        return value
    kind = {"kind": type(value).__name__} if is_dataclass(value) else {}
    return kind | {str(name): _plain(each, _at(path, name), arrays) for name, each in parts.items()}


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """A value's parts by name, None if it has none."""
    if hasattr(value, "to_arrays"):
        return cast(Mapping[Any, Any], value.to_arrays())
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return value if isinstance(value, Mapping) else None


def _at(path: str, entry: object) -> str:
    return f"{path}.{entry}" if path else str(entry)


@dataclass(frozen=True)
class _Reader:
    """Reads by declared type; notes which arrays were asked for."""

    arrays: Mapping[str, NDArray[Any]]
    projector: Projector | None
    make: Callable[[NDArray[Any]], Array]
    taken: set[str] = field(default_factory=set)

    def read(self, hint: Any, plain: Any, path: str) -> Any:
        """Return the value of a declared type at a place."""
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any or origin is np.ndarray:
            found = self.array(plain, path)
            return self.make(found) if hint is Any else found
        if hint in ALTERNATIVES or origin in (Union, UnionType):
            return self.one_of(ALTERNATIVES.get(hint, arguments), plain, path)
        if hint is Projector:
            return self.remembering(plain, path)
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
        candidates = tuple(each for each in candidates if each is not NoneType)
        if len(candidates) > 1:
            kind = plain.get("kind") if isinstance(plain, dict) else None
            candidates = tuple(each for each in candidates if each.__name__ == kind)
        if not candidates:
            raise MisfitError(f"'{path}' is of no known kind")
        return self.read(candidates[0], plain, path)

    def record(self, hint: type, plain: Any, path: str) -> Any:
        """Return a dataclass."""
        hints = get_type_hints(hint)
        names = [each.name for each in fields(hint)]
        if not isinstance(plain, dict) or set(plain) != {"kind", *names} or plain["kind"] != hint.__name__:
            raise MisfitError(f"'{path}' is no {hint.__name__}")
        return hint(**{name: self.read(hints[name], plain[name], _at(path, name)) for name in names})

    def remembering(self, plain: Any, path: str) -> Projector:
        """Return the method's projector with the memory at a place."""
        if self.projector is None or not isinstance(plain, dict) or plain.get("kind") != type(self.projector).__name__:
            raise MisfitError(f"'{path}' is no memory of the method's projector")
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
            raise MisfitError(f"'{path}' is no list")
        alike = origin is list or arguments[1:] == (...,)
        hints = [arguments[0]] * len(plain) if alike else list(arguments)
        if len(hints) != len(plain):
            raise MisfitError(f"'{path}' has {len(plain)} entries, not {len(hints)}")
        pairs = zip(hints, plain, strict=True)
        return origin(self.read(each, value, _at(path, n)) for n, (each, value) in enumerate(pairs))

    def mapping(self, arguments: tuple[Any, ...], plain: Any, path: str) -> dict[Any, Any]:
        """Return a mapping from names or numbers."""
        key, hint = arguments
        if not isinstance(plain, dict) or (key is int and not all(name.isdecimal() for name in plain)):
            raise MisfitError(f"'{path}' is no mapping")
        return {key(name): self.read(hint, value, _at(path, name)) for name, value in plain.items()}


def _scalar(hint: Any, plain: Any, path: str) -> Any:
    if hint is float and isinstance(plain, str) and plain in NUMBERS:
        return NUMBERS[plain]
    if type(plain) is hint or (hint is float and type(plain) is int):
        return plain
    raise MisfitError(f"'{path}' is no {hint.__name__}")
