"""The backends that the suite runs on: an Array API namespace each, the way to it from NumPy, and the way back.

A new backend is one more line of ``BACKENDS``; nothing is imported until it is asked for.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import namespace

__all__ = ["BACKENDS", "Backend", "load", "to_numpy", "to_xp"]


@dataclass(frozen=True)
class Backend:
    """A backend.

    Attributes:
        module: its Array API namespace.
        configure: (namespace, "cpu" or "gpu") -> None, called once, before any array is made: where arrays are to live.
        from_numpy: (namespace, a NumPy array that nothing else uses) -> an array of the same dtype.
        to_numpy: array -> NumPy array.
    """

    module: str
    configure: Callable[[Any, str], object] = lambda xp, device: None
    from_numpy: Callable[[Any, NDArray[Any]], Any] = lambda xp, array: xp.asarray(array)
    to_numpy: Callable[[Any], NDArray[Any]] = np.asarray


def _without_data_dependence(xp: Any, _: str) -> None:
    """Leave out what no jit can do: then what passes here is fit for any."""
    xp.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)


def _torch_on(_: Any, device: str) -> None:
    torch: Any = importlib.import_module("torch")
    if device == "gpu":
        torch.set_default_device("cuda")


def _jax_on(_: Any, device: str) -> None:
    jax: Any = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu" if device == "cpu" else "cuda")


def _tensorflow_on(_: Any, device: str) -> None:
    tensorflow: Any = importlib.import_module("tensorflow")
    if device == "cpu":
        tensorflow.config.set_visible_devices([], "GPU")


BACKENDS = {
    "numpy": Backend("array_api_compat.numpy"),
    "strict": Backend("array_api_strict"),
    "strictest": Backend("array_api_strict", configure=_without_data_dependence),
    "torch": Backend(
        "array_api_compat.torch", configure=_torch_on, to_numpy=lambda array: np.asarray(array.detach().cpu())
    ),
    "jax": Backend("jax.numpy", configure=_jax_on),
    "tensorflow": Backend("became_core.arrays.tensorflow", configure=_tensorflow_on),
    "cupy": Backend("array_api_compat.cupy", to_numpy=lambda array: array.get()),
    "dask": Backend("array_api_compat.dask.array"),
}

_BY_MODULE = {backend.module: backend for backend in BACKENDS.values()}


def load(name: str, device: str) -> Any:
    """Return a backend's namespace, whose arrays are to live on the processor, "cpu", or on a "gpu", as CuPy's do."""
    backend = BACKENDS[name]
    xp = importlib.import_module(backend.module)
    backend.configure(xp, device)
    return xp


def to_xp(xp: Any, tree: Any) -> Any:
    """Return a dictionary of NumPy arrays, or a single one, as arrays of a namespace, with the same dtypes."""
    if isinstance(tree, dict):
        return {name: to_xp(xp, leaf) for name, leaf in tree.items()}
    # A copy: tests may hand over read-only views, and no two arrays should share memory.
    return _BY_MODULE[xp.__name__].from_numpy(xp, np.array(tree))


def to_numpy(array: Any) -> NDArray[Any]:
    """Return an array of any backend as one of NumPy."""
    return _BY_MODULE[namespace(array=array).__name__].to_numpy(array)
