"""Each framework's compiler, behind one name."""

from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["compiled"]


def compiled(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if backend == "jax":
        import jax

        return jax.jit(function)  # type: ignore[no-any-return]
    if backend == "torch":
        import torch

        return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
    if backend == "tensorflow":
        import tensorflow

        return tensorflow.function(function, jit_compile=True)  # type: ignore[no-any-return]
    pytest.skip("this backend has no compiler")
