"""The gateway to the Array API: the namespace that arrays share, what to reduce them in, and checks of their values.

Convention: code in the core receives arrays, asks here for their namespace ``xp`` and calls nothing else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from numpy.typing import NDArray

from became_core.arrays.frameworks import Framework, framework_of
from became_core.errors import BecameError

__all__ = [
    "Array",
    "check_values",
    "device",
    "eigh",
    "framework_for",
    "has_values",
    "in_single",
    "lerp_of",
    "namespace",
    "on_host",
    "promoted",
    "reduction_dtype",
]

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
    expected = _namespace_of(first_name, first)
    for name, array in arrays.items():
        if type(array) is type(first):
            continue
        other = _namespace_of(name, array)
        if other is not expected:
            raise BecameError(
                f"{first_name} is an array of {_short_name(expected)} but {name} is one of {_short_name(other)}; "
                "give arrays of a single framework."
            )
    return expected


def _namespace_of(name: str, array: Array) -> Any:
    framework, _ = framework_for(name, array)
    return framework.namespace(array)


def framework_for(name: str, array: Array) -> tuple[Framework, Any]:
    """Return the framework of an array, which a message calls by this name, and its loaded module.

    Raises:
        BecameError: if it is no array of a known framework.
    """
    framework = framework_of(array)
    if framework is None:
        kind = type(array)
        raise BecameError(f"{name} is a {kind.__module__}.{kind.__qualname__}, not an array of a known framework.")
    return framework


def _short_name(xp: Any) -> str:
    return str(xp.__name__).removeprefix("array_api_compat.").removeprefix("became_core.arrays.")


def device(array: Array) -> Any:
    """Return the device an array lives on, as its framework calls it."""
    framework, _ = framework_for("the value", array)
    return framework.device(array)


def on_host(array: Array) -> NDArray[Any]:
    """Return an array's numbers in NumPy, of the same dtype, from whatever device; it may share memory with them.

    NumPy has no bfloat16, so PyTorch's is returned as float32.
    """
    framework, _ = framework_for("the value", array)
    return framework.on_host(array)


def reduction_dtype(xp: Any, **arrays: Array) -> Any:
    """Return the dtype to reduce these arrays in: their promoted type, and at least float32.

    Raises:
        BecameError: if one does not hold real floating-point numbers.
    """
    dtypes: list[Any] = []  # each once: there are many arrays, and the standard's questions take their time
    for name, array in arrays.items():
        if any(array.dtype == dtype for dtype in dtypes):
            continue
        if not xp.isdtype(array.dtype, "real floating"):
            # TensorFlow's str would be "<dtype: 'int64'>"; PyTorch's dtypes have no name but their str.
            dtype = getattr(array.dtype, "name", array.dtype)
            raise BecameError(f"{name} has dtype {dtype}; it must hold real floating-point numbers.")
        dtypes.append(array.dtype)
    # Half precisions give way to float32 here, and not in result_type: torch.compile cannot trace it for them.
    wide = [dtype for dtype in dtypes if xp.finfo(dtype).bits >= 32]
    return xp.result_type(xp.float32, *wide)


def in_single(array: Array) -> Array:
    """Return an array in at least float32: sums in float16 end at 65,504, and in bfloat16 they soon stop growing.

    Example:
        >>> import numpy as np
        >>> in_single(np.ones(1, np.float16)).dtype.name, in_single(np.ones(1)).dtype.name
        ('float32', 'float64')
    """
    xp = namespace(array=array)
    return xp.astype(array, reduction_dtype(xp, array=array), copy=False)


def promoted(*arrays: Array) -> tuple[Array, ...]:
    """Return arrays in one dtype: the one that all have, or else their promoted one, which is at least float32.

    TensorFlow's operators promote nothing.

    Example:
        >>> import numpy as np
        >>> [array.dtype.name for array in promoted(np.ones(1, np.float16), np.ones(1, np.float32))]
        ['float32', 'float32']
    """
    if all(array.dtype == arrays[0].dtype for array in arrays):
        return arrays
    named = {f"array {index}": array for index, array in enumerate(arrays)}
    xp = namespace(**named)
    dtype = reduction_dtype(xp, **named)
    return tuple(xp.astype(array, dtype, copy=False) for array in arrays)


def check_values(condition: Array, message: str) -> None:
    """Raise a BecameError with this message unless a 0-d boolean array is true.

    Where there is no value to look at, nothing is checked: under a trace (``jax.jit``, ``jax.vmap``, ``torch.compile``,
    ``torch.func``, ``tf.function``), and on lazy arrays, which looking would compute.
    """
    if has_values(condition) and not bool(condition):
        raise BecameError(message)


def has_values(array: Array) -> bool:
    """Whether an array's numbers can be looked at now: it is not traced, and looking would not compute a lazy graph."""
    framework, module = framework_for("the value", array)
    return framework.have_values(module, [array])


def eigh(array: Array) -> tuple[Array, Array]:
    """Return the eigenvalues, ascending, and the eigenvectors of a symmetric matrix [d, d], the quickest way there is.

    Through it, TensorFlow's ``ForwardAccumulator`` finds no derivative in eager mode; gradients are as usual.
    """
    framework, module = framework_for("the value", array)
    if framework.eigh is not None and framework.have_values(module, [array]) and framework.on_cpu(array):
        return framework.eigh(array)
    xp: Any = framework.namespace(array)
    values, vectors = xp.linalg.eigh(array)
    return values, vectors


def lerp_of(array: Array) -> Callable[[Array, Array, Array | float], Array] | None:
    """Return the framework's own interpolation, if it has one: ``frameworks.Framework.lerp`` without its module."""
    framework, module = framework_for("the value", array)
    return None if framework.lerp is None else partial(framework.lerp, module)
