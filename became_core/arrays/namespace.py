"""The gateway to the Array API: the namespace that arrays share, what to reduce them in, and checks of their values.

Convention: code in the core receives arrays, asks here for their namespace ``xp`` and calls nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from numpy.typing import NDArray

from became_core.arrays.frameworks import Framework, Kernels, State, framework_of
from became_core.errors import BecameError

__all__ = [
    "Array",
    "Walk",
    "check_values",
    "device",
    "has_values",
    "have_values",
    "lerp_of",
    "loop_of",
    "namespace",
    "on_host",
    "reduction_dtype",
    "repeated",
    "walk_of",
]

# How many elements an accelerator sums at a time: it needs no cache, but time to be told of each operation.
ACCELERATOR_SLAB = 2**22

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
        if type(array) is type(first):
            continue
        other = _namespace_of(name, array)
        if other is not found:
            raise BecameError(
                f"{first_name} is an array of {_short_name(found)} but {name} is one of {_short_name(other)}; "
                "give arrays of a single framework."
            )
    return found


def _namespace_of(name: str, array: Array) -> Any:
    framework, _ = _framework_of(name, array)
    return framework.namespace(array)


def _framework_of(name: str, array: Array) -> tuple[Framework, Any]:
    found = framework_of(array)
    if found is None:
        kind = type(array)
        raise BecameError(f"{name} is a {kind.__module__}.{kind.__qualname__}, not an array of a known framework.")
    return found


def _short_name(xp: Any) -> str:
    return str(xp.__name__).removeprefix("array_api_compat.").removeprefix("became_core.arrays.")


def device(array: Array) -> Any:
    """Return the device an array lives on, as its framework calls it."""
    framework, _ = _framework_of("the value", array)
    return framework.device(array)


def on_host(array: Array) -> NDArray[Any]:
    """Return an array's numbers in NumPy, of the same dtype, from whatever device; it may share memory with them."""
    framework, _ = _framework_of("the value", array)
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


def check_values(condition: Array, message: str) -> None:
    """Raise a BecameError with this message unless a 0-d boolean array is true.

    Where there is no value to look at, nothing is checked: under a trace (``jax.jit``, ``jax.vmap``, ``torch.compile``,
    ``torch.func``, ``tf.function``), and on lazy arrays, which looking would compute.
    """
    if has_values(condition) and not bool(condition):
        raise BecameError(message)


def has_values(array: Array) -> bool:
    """Whether an array's numbers can be looked at now: neither is it traced, nor would looking compute a lazy graph."""
    framework, module = _framework_of("the value", array)
    return framework.has_values(module, array)


def have_values(arrays: Sequence[Array]) -> bool:
    """Whether the numbers of all these arrays, which share a framework, can be looked at now."""
    framework, module = _framework_of("the value", arrays[0])
    return all(framework.has_values(module, array) for array in arrays)


def loop_of(array: Array) -> Callable[..., Array] | None:
    """Return the loop of the framework's compiler if sums need one: ``frameworks.Loop`` without its module."""
    framework, module = _framework_of("the value", array)
    loop = framework.loop(module)
    return None if loop is None else partial(loop, module)


def repeated(step: Callable[[State], State], state: State, times: int) -> State:
    """Return what comes out of a step that is applied so many times to a tuple of arrays, whatever their values.

    Args:
        step: state -> state, of the same shapes and dtypes.
        state: arrays of one framework.
        times: how often.
    """
    framework, module = _framework_of("the state", state[0])
    return framework.repeat(module, step, state, times)


def lerp_of(array: Array) -> Callable[[Array, Array, Array | float], Array] | None:
    """Return the framework's own interpolation, if it has one: ``frameworks.Framework.lerp`` without its module."""
    framework, module = _framework_of("the value", array)
    return None if framework.lerp is None else partial(framework.lerp, module)


@dataclass(frozen=True)
class Walk:
    """How sums go over arrays that have values, slab by slab.

    Attributes:
        kinds: the arrays' dtypes and devices.
        slab: how many elements at a time.
        rows: whether a slab is cut into rows, so that no long sum is left to the framework: on a processor.
        fuses_inner_products: whether the framework's inner products take one pass, without writing the products first.
        writes: whether a function can be told to write its result into an array that is there already.
        kernels: what the framework does in one pass; None if it has no such, or does not write.
    """

    kinds: tuple[tuple[Any, Any], ...]
    slab: int
    rows: bool
    fuses_inner_products: bool
    writes: bool
    kernels: Kernels | None = field(compare=False)


def walk_of(arrays: Sequence[Array]) -> Walk:
    """Return how sums go over arrays of one framework that have values."""
    first = arrays[0]
    framework, module = _framework_of("the value", first)
    on_cpu, writes = framework.on_cpu(first), framework.takes_out(module, arrays)
    return Walk(
        kinds=tuple((array.dtype, framework.device(array)) for array in arrays),
        slab=framework.slab if on_cpu else ACCELERATOR_SLAB,
        rows=on_cpu,
        fuses_inner_products=framework.fuses_inner_products(first),
        writes=writes,
        kernels=framework.kernels(module) if writes and framework.kernels is not None else None,
    )
