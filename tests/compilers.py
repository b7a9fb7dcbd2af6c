"""Each framework's compiler, behind one name.

Nox's session on JAX turns most of XLA's optimisations off, because there compilation costs more than all else. A test
of what the optimiser may do to our numbers turns them on again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["compiled", "optimised_by_jax"]


@contextmanager
def optimised_by_jax() -> Iterator[None]:
    """Let JAX compile as it does for users, whatever the session says; for what is not compiled yet."""
    import jax

    option = "jax_disable_most_optimizations"
    before = jax.config.read(option)
    jax.config.update(option, False)
    try:
        yield
    finally:
        jax.config.update(option, before)


def compiled(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as the framework compiles it for users."""
    if backend == "jax":
        import jax

        by_jax = jax.jit(function)

        def optimised(*arguments: Any) -> Any:
            with optimised_by_jax():
                return by_jax(*arguments)

        return optimised
    if backend == "torch":
        import torch

        return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
    if backend == "tensorflow":
        import tensorflow

        return tensorflow.function(function, jit_compile=True)  # type: ignore[no-any-return]
    pytest.skip("this backend has no compiler")
