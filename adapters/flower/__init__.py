"""Federations with Flower: a strategy that merges clients by their curvature, and what a client answers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.flower.local import LocalGrid
    from adapters.flower.messages import answer, record_of, weights_of
    from adapters.flower.strategy import MergeStrategy

__all__ = ["LocalGrid", "MergeStrategy", "answer", "record_of", "weights_of"]

_WHERE = {"LocalGrid": "local", "MergeStrategy": "strategy", "answer": "messages", "record_of": "messages"}


def __getattr__(name: str) -> Any:
    """Import Flower when something of it is asked for, and not before."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"adapters.flower.{_WHERE.get(name, 'messages')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
