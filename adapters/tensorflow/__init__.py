"""The TensorFlow adapter: networks, a learner, ``Continual`` for Keras, and ``python -m adapters.tensorflow.run``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.tensorflow.continual import Continual

__all__ = ["Continual"]


def __getattr__(name: str) -> Any:
    """Import TensorFlow when ``Continual`` is asked for, and not before: without it, the command says so itself."""
    if name in __all__:
        from adapters.tensorflow.continual import Continual

        return Continual
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
