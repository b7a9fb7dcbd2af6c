"""The gateway to the Array API: the one module that knows which framework an array belongs to.

Convention: code in the core receives arrays, asks here for their namespace ``xp`` and calls nothing else.
"""

import sys
from typing import Any

import array_api_compat

from became_core.errors import BecameError

__all__ = ["Array", "check_values", "device", "namespace", "reduction_dtype"]

# An array of any framework. The Array API has no static type yet that NumPy, PyTorch and JAX all satisfy.
Array = Any


def namespace(**arrays: Array) -> Any:
    """Return the Array API namespace that all these arrays share.

    Args:
        arrays: the arrays by the names a message should call them.

    Raises:
        BecameError: if one is no array, or two belong to different frameworks.
    """
    first_name, first = next(iter(arrays.items()))
    found = _namespace_of(first_name, first)
    for name, array in arrays.items():
        other = _namespace_of(name, array)
        if other is not found:
            raise BecameError(
                f"{first_name} is an array of {_short_name(found)} but {name} is one of {_short_name(other)}; "
                "give arrays of a single framework."
            )
    return found


def _namespace_of(name: str, array: Array) -> Any:
    try:
        return array_api_compat.array_namespace(array)
    except TypeError:
        raise BecameError(
            f"{name} is a {type(array).__module__}.{type(array).__qualname__}, not an array of a known framework."
        ) from None


def _short_name(xp: Any) -> str:
    return str(xp.__name__).removeprefix("array_api_compat.")


def device(array: Array) -> Any:
    """Return the device an array lives on, as its framework calls it."""
    return array_api_compat.device(array)


def reduction_dtype(xp: Any, **arrays: Array) -> Any:
    """Return the dtype to reduce these arrays in: their promoted type, and at least float32.

    Raises:
        BecameError: if one does not hold real floating-point numbers.
    """
    for name, array in arrays.items():
        if not xp.isdtype(array.dtype, "real floating"):
            raise BecameError(f"{name} has dtype {array.dtype}; it must hold real floating-point numbers.")
    return xp.result_type(*(array.dtype for array in arrays.values()), xp.float32)


def check_values(condition: Array, message: str) -> None:
    """Raise a BecameError with this message unless a 0-d boolean array is true.

    Under a trace (``jax.jit``, ``torch.compile``, ``torch.func``) there is no value to look at, and nothing is checked.
    """
    if _is_concrete(condition) and not bool(condition):
        raise BecameError(message)


def _is_concrete(array: Array) -> bool:
    if "jax" in sys.modules and isinstance(array, sys.modules["jax"].core.Tracer):
        return False
    if "torch" in sys.modules and isinstance(array, sys.modules["torch"].Tensor):
        torch = sys.modules["torch"]
        return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(array))
    return True
