"""Each framework's compiler, and its gradients, behind one name.

Nox's sessions with JAX turn most of XLA's optimisations off, because there compilation costs more than all else. A test
of what the optimiser may do to our numbers turns them on again: all of them for one function, or, for a whole run, all
but those that a process turns on or off as it begins.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["compiled", "gradient_of", "optimised"]

# XLA's own defaults of what ``compile_quickly`` of ``noxfile.py`` changes.
XLA_DEFAULTS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}


@contextmanager
def optimised() -> Iterator[None]:
    """Within it, JAX compiles everything anew and as for users, but for XLA's fusion emitters."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
        jax.clear_caches()


def compiled(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as the framework compiles it for users, whatever the session says."""
    if backend == "jax":
        import jax

        return jax.jit(function, compiler_options=XLA_DEFAULTS)  # type: ignore[no-any-return]
    if backend == "torch":
        import torch

        return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
    if backend == "tensorflow":
        import tensorflow

        return tensorflow.function(function, jit_compile=True)  # type: ignore[no-any-return]
    pytest.skip("this backend has no compiler")


def gradient_of(backend: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the gradient of a function of one array that returns a 0-d array."""
    if backend == "jax":
        import jax

        return jax.grad(function)  # type: ignore[no-any-return]
    if backend == "torch":
        import torch

        return torch.func.grad(function)
    if backend == "tensorflow":
        import tensorflow

        def gradient(value: Any) -> Any:
            with tensorflow.GradientTape() as tape:
                tape.watch(value)
                result = function(value)
            return tape.gradient(result, value)

        return gradient
    pytest.skip("this backend has no automatic differentiation")
