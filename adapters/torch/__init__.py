"""The PyTorch adapter: networks, a learner, ``Continual`` for a loop of one's own, ``python -m adapters.torch.run``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.torch.continual import Continual

__all__ = ["Continual"]


def __getattr__(name: str) -> Any:
    """Import PyTorch when ``Continual`` is asked for, and not before: without PyTorch, the command says so itself."""
    if name in __all__:
        from adapters.torch.continual import Continual

        return Continual
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
