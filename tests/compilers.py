"""Each framework's compiler, behind one name.

Nox's session on JAX turns most of XLA's optimisations off, because there compilation costs more than all else. A test
of what the optimiser may do to our numbers turns them on again.
"""

from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["compiled"]

# XLA's own defaults of what ``compile_quickly`` of ``noxfile.py`` turns off.
XLA_DEFAULTS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}


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
