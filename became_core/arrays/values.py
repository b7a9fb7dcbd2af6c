"""Values: frozen dataclasses of arrays that every framework takes for a tree, so that they pass through its transforms.

Convention: a field that holds arrays, or containers of them, is a child; one made by ``static`` is part of the
structure. JAX and PyTorch are told of the classes when the first of their arrays is met; no framework is imported here.
"""

from collections.abc import Callable, Iterable
from dataclasses import field, fields
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

__all__ = ["introduce_to_jax", "introduce_to_torch", "pytree", "static"]

C = TypeVar("C")


class _Class(NamedTuple):
    """A value class and how it is taken apart, into children and structure, and put together again."""

    cls: type
    flatten: Callable[[Any], tuple[tuple[Any, ...], tuple[Any, ...]]]
    unflatten: Callable[[tuple[Any, ...], Iterable[Any]], Any]


_CLASSES: list[_Class] = []
_known_to = {"jax": 0, "torch": 0}  # so many of them


def static(**options: Any) -> Any:
    """Return a dataclass field that is part of a value's structure: a number or a name, no array."""
    return field(metadata={"static": True}, **options)


def pytree(cls: type[C]) -> type[C]:
    """Make a frozen dataclass a tree for the frameworks, as every dataclass is one for this package."""
    every = fields(cls)  # type: ignore[arg-type] # a dataclass, as the docstring asks
    children = tuple(each.name for each in every if not each.metadata.get("static"))
    structure = tuple(each.name for each in every if each.metadata.get("static"))

    def flatten(instance: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(instance, name) for name in children), tuple(getattr(instance, name) for name in structure)

    def unflatten(fixed: tuple[Any, ...], parts: Iterable[Any]) -> Any:
        # Past __init__ and its checks: transforms rebuild values around things that are no arrays.
        instance = object.__new__(cls)
        for name, part in [*zip(children, parts, strict=True), *zip(structure, fixed, strict=True)]:
            object.__setattr__(instance, name, part)
        return instance

    # TensorFlow's own protocol for such classes.
    cls.__tf_flatten__ = lambda self: flatten(self)[::-1]  # type: ignore[attr-defined]
    cls.__tf_unflatten__ = classmethod(lambda _, fixed, parts: unflatten(fixed, parts))  # type: ignore[attr-defined]
    _CLASSES.append(_Class(cls, flatten, unflatten))
    return cls


def introduce_to_jax(jax: ModuleType) -> None:
    """Register with JAX all value classes that it does not know yet."""
    for each in _unknown_to("jax"):
        jax.tree_util.register_pytree_node(each.cls, each.flatten, each.unflatten)


def introduce_to_torch(torch: ModuleType) -> None:
    """Register with PyTorch all value classes that ``torch.func`` and ``torch.export`` do not know yet.

    ``torch.compile`` takes them for what they are, dataclasses, and cannot trace a registration.
    """
    if torch.compiler.is_compiling() or _known_to["torch"] == len(_CLASSES):
        return
    for each in _unknown_to("torch"):
        torch.utils._pytree.register_pytree_node(each.cls, *_as_torch_asks(each))


def _as_torch_asks(each: _Class) -> tuple[Callable[[Any], Any], Callable[[Iterable[Any], Any], Any]]:
    """How PyTorch takes a value apart, into a list and the structure, and puts it together, the structure last."""

    def flatten(instance: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children, structure = each.flatten(instance)
        return list(children), structure

    return flatten, lambda children, structure: each.unflatten(structure, children)


def _unknown_to(framework: str) -> list[_Class]:
    unknown = _CLASSES[_known_to[framework] :]
    _known_to[framework] = len(_CLASSES)
    return unknown
