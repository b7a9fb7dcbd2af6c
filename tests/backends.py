"""The backends that the suite runs on: an Array API namespace each, and the way back to NumPy.

A new backend is one more line of ``BACKENDS``; nothing is imported until it is asked for.
"""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BACKENDS", "load", "to_numpy", "to_xp"]

BACKENDS = {
    "numpy": "array_api_compat.numpy",
    "strict": "array_api_strict",
    "torch": "array_api_compat.torch",
}


def load(name: str) -> Any:
    """Return a backend's namespace."""
    return importlib.import_module(BACKENDS[name])


def to_xp(xp: Any, tree: Any) -> Any:
    """Return a dictionary of NumPy arrays, or a single one, as arrays of a namespace, with the same dtypes."""
    if isinstance(tree, dict):
        return {name: to_xp(xp, leaf) for name, leaf in tree.items()}
    # A copy: tests may hand over read-only views, and no two arrays should share memory.
    return xp.asarray(np.array(tree))


def to_numpy(array: Any) -> NDArray[Any]:
    """Return an array of any backend as one of NumPy."""
    return np.asarray(array.detach() if hasattr(array, "detach") else array)
