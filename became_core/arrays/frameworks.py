"""What tells the frameworks apart: the one table of the package that knows them by name.

Convention: a framework is looked up among the loaded modules, so none is imported that nobody uses, and what no row
claims is left to array-api-compat (NumPy, array-api-strict and whatever else has ``__array_namespace__``).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from became_core.arrays.values import introduce_to_jax, introduce_to_torch

__all__ = ["Framework", "Kernels", "State", "framework_of", "is_array"]


def _own_device(array: Any) -> Any:
    return array.device


# What walks flat arrays, (module, step, finish, arrays, size, run), in pieces of so many elements, adds up the step's
# results, [terms, size], over each run of so many pieces one after the other, and returns what ``finish`` makes of
# every run's total, the last and shorter one's too, stacked. Elements that fill no piece are a run of their own, with
# zeros behind its results.
Step = Callable[[list[Any]], Any]
Loop = Callable[[Any, Step, Callable[[Any], Any], Sequence[Any], int, int], Any]


def _jax_loop(jax: Any, step: Step, finish: Callable[[Any], Any], arrays: Sequence[Any], size: int, run: int) -> Any:
    jnp = jax.numpy

    # The pieces are sliced within the loop: what is sliced before it is copied as a whole.
    def at(index: Any) -> Any:
        return step([jax.lax.dynamic_slice_in_dim(array, index * size, size) for array in arrays])

    def total(first: Any, pieces: int) -> Any:
        return finish(jax.lax.fori_loop(1, pieces, lambda later, sofar: sofar + at(first + later), at(first)))

    pieces, rest = divmod(arrays[0].shape[0], size)
    whole, left = divmod(pieces, run)
    totals = [jax.lax.map(lambda number: total(number * run, run), jnp.arange(whole))]
    if left:
        totals.append(total(whole * run, left)[None])
    if rest:
        totals.append(finish(jnp.pad(step([array[-rest:] for array in arrays]), ((0, 0), (0, size - rest))))[None])
    return jnp.concat(totals)


def _tensorflow_loop(
    tensorflow: Any, step: Step, finish: Callable[[Any], Any], arrays: Sequence[Any], size: int, run: int
) -> Any:
    def at(index: Any) -> Any:
        return step([tensorflow.slice(array, [index * size], [size]) for array in arrays])

    def total(first: Any, pieces: int) -> Any:
        _, found = tensorflow.while_loop(
            lambda later, sofar: later < pieces,
            lambda later, sofar: (later + 1, sofar + at(first + later)),
            (1, at(first)),
            maximum_iterations=pieces - 1,
        )
        return finish(found)

    pieces, rest = divmod(arrays[0].shape[0], size)
    whole, left = divmod(pieces, run)
    totals = []
    if whole:
        # The dtype must be known beforehand: that of a first result, of which nothing else is kept.
        numbers, dtype = tensorflow.range(whole), at(0).dtype
        totals.append(tensorflow.map_fn(lambda number: total(number * run, run), numbers, fn_output_signature=dtype))
    if left:
        totals.append(total(whole * run, left)[None])
    if rest:
        found = tensorflow.pad(step([array[-rest:] for array in arrays]), ((0, 0), (0, size - rest)))
        totals.append(finish(found)[None])
    return tensorflow.concat(totals, axis=0)


# What applies a step to a tuple of arrays so many times, (module, step, state, times), and returns what comes out last.
State = tuple[Any, ...]
Repeat = Callable[[Any, Callable[[State], State], State, int], State]


def _repeat(_: Any, step: Callable[[State], State], state: State, times: int) -> State:
    for _ in range(times):
        state = step(state)
    return state


def _jax_repeat(jax: Any, step: Callable[[State], State], state: State, times: int) -> State:
    found: State = jax.lax.fori_loop(0, times, lambda _, sofar: step(sofar), state)
    return found


def _tensorflow_repeat(tensorflow: Any, step: Callable[[State], State], state: State, times: int) -> State:
    _, *found = tensorflow.while_loop(
        lambda index, *_: index < times,
        lambda index, *sofar: (index + 1, *step(tuple(sofar))),
        (0, *state),
        maximum_iterations=times,
    )
    return tuple(found)


@dataclass(frozen=True)
class Kernels:
    """What a framework does in one pass, where the standard's functions take several, or do it slower.

    Attributes:
        add_product: (total, left, right), which adds left * right to total where it lies.
        squared_difference: (left, right, out) -> out, which it makes (left - right)^2.
        least: array -> its least element, 0-d.
        inner_product: (left, right), flat -> the sum of their products, 0-d.
    """

    add_product: Callable[[Any, Any, Any], object]
    squared_difference: Callable[[Any, Any, Any], Any]
    least: Callable[[Any], Any]
    inner_product: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Framework:
    """How arrays of one framework are recognised and what may be asked of them.

    Attributes:
        module: the module that must be loaded for there to be any such array; "" for one that always is.
        owns: (module, object) -> whether the object is such an array, a traced one included.
        namespace: array -> its Array API namespace.
        device: array -> the device it lives on, as its framework calls it.
        has_values: (module, array) -> whether its numbers can be looked at: neither is it traced, nor would looking
            compute a lazy graph.
        loop: module -> the compiler's own; None where the compiler computes what is summed as it sums it, as XLA does
            on a GPU and not on a CPU. The default device is what decides: a trace knows no other.
        repeat: the compiler's own repetition, so that a step is compiled once; else as many copies of it.
        on_cpu: array -> whether a processor computes with it, and not an accelerator.
        slab: how many elements of such an array are summed at a time where values exist: so few that with a few
            temporaries they stay within the cache, or so many that a call of the framework's own, which costs more, is
            worth it.
        fuses_inner_products: array -> whether ``vecdot`` of its like takes one pass, without writing the products
            first.
        takes_out: (module, arrays) -> whether a function of these can be told to write its result into an array that is
            there already.
        kernels: module -> its ``Kernels``; None if it has none. Asked for only where ``takes_out``.
        lerp: (module, start, end, weight) -> start + weight * (end - start) in one pass, reckoned from the nearer end,
            so that both ends are exact; None if the framework has none.
        on_host: array -> its numbers in NumPy, from whatever device.
    """

    module: str
    owns: Callable[[Any, Any], bool]
    namespace: Callable[[Any], Any] = array_api_compat.array_namespace
    device: Callable[[Any], Any] = array_api_compat.device
    has_values: Callable[[Any, Any], bool] = lambda module, array: True
    loop: Callable[[Any], Loop | None] = lambda module: None
    repeat: Repeat = _repeat
    on_cpu: Callable[[Any], bool] = lambda array: True
    slab: int = 2**18
    fuses_inner_products: Callable[[Any], bool] = lambda array: False
    takes_out: Callable[[Any, Sequence[Any]], bool] = lambda module, arrays: False
    kernels: Callable[[Any], Kernels] | None = None
    lerp: Callable[[Any, Any, Any, Any], Any] | None = None
    on_host: Callable[[Any], NDArray[Any]] = np.asarray


def _torch_namespace(_: Any) -> Any:
    # Not by way of array_api_compat.array_namespace: torch.compile warns of its caches.
    import array_api_compat.torch

    introduce_to_torch(sys.modules["torch"])
    return array_api_compat.torch


def _torch_on_cpu(array: Any) -> bool:
    return bool(array.device.type == "cpu")


def _torch_has_values(torch: Any, array: Any) -> bool:
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(array))


def _torch_takes_out(torch: Any, arrays: Sequence[Any]) -> bool:
    # Not where derivatives are taken, backwards or forwards.
    backwards = torch.is_grad_enabled() and any(array.requires_grad for array in arrays)
    return not backwards and torch.autograd.forward_ad._current_level < 0


def _torch_kernels(torch: Any) -> Kernels:
    return Kernels(
        add_product=lambda total, left, right: torch.addcmul(total, left, right, out=total),
        # The squared error with no reduction (0), under the only public name by which it can be told where to write.
        squared_difference=lambda left, right, out: torch.ops.aten.mse_loss.out(left, right, 0, out=out),
        least=torch.min,
        inner_product=torch.dot,
    )


def _jax_namespace(array: Any) -> Any:
    introduce_to_jax(sys.modules["jax"])
    return array_api_compat.array_namespace(array)


def _tensorflow_namespace(_: Any) -> Any:
    import became_core.arrays.tensorflow as xp

    return xp


def _is_any_other_array(_: Any, value: Any) -> bool:
    # The type's attribute, where array-api-compat asks for the object's: an nnx.Param lends its value's, and is a node.
    return array_api_compat.is_numpy_array(value) or hasattr(type(value), "__array_namespace__")


_ROWS = (
    # PyTorch is first: torch.compile traces the rows before its own, and can trace none of the others.
    Framework(
        module="torch",
        owns=lambda torch, array: isinstance(array, torch.Tensor),
        namespace=_torch_namespace,
        device=_own_device,
        has_values=_torch_has_values,
        on_cpu=_torch_on_cpu,
        slab=2**19,
        fuses_inner_products=lambda array: not _torch_on_cpu(array),
        takes_out=_torch_takes_out,
        kernels=_torch_kernels,
        lerp=lambda torch, start, end, weight: torch.lerp(start, end, weight),
        on_host=lambda array: np.asarray(array.detach().cpu()),
    ),
    Framework(
        module="tensorflow",
        owns=lambda tensorflow, array: isinstance(array, tensorflow.Tensor | tensorflow.Variable),
        namespace=_tensorflow_namespace,
        device=_own_device,
        # A variable that a graph captures is not symbolic, but what is computed from it is.
        has_values=lambda tensorflow, array: (
            tensorflow.executing_eagerly() and not tensorflow.is_symbolic_tensor(array)
        ),
        loop=lambda tensorflow: None if tensorflow.config.list_physical_devices("GPU") else _tensorflow_loop,
        repeat=_tensorflow_repeat,
        on_cpu=lambda array: "GPU" not in array.device,
        slab=2**20,
    ),
    Framework(
        module="jax",
        owns=lambda jax, array: isinstance(array, jax.Array),
        namespace=_jax_namespace,
        has_values=lambda jax, array: not isinstance(array, jax.core.Tracer),
        loop=lambda jax: _jax_loop if jax.default_backend() == "cpu" else None,
        repeat=_jax_repeat,
        on_cpu=lambda array: all(device.platform == "cpu" for device in array.devices()),
    ),
    Framework(
        module="dask.array",
        owns=lambda dask, array: isinstance(array, dask.Array),
        has_values=lambda dask, array: False,
    ),
    Framework(
        module="cupy",
        owns=lambda cupy, array: isinstance(array, cupy.ndarray),
        on_cpu=lambda array: False,
        fuses_inner_products=lambda array: True,
        takes_out=lambda cupy, arrays: True,
        on_host=lambda array: array.get(),
    ),
    Framework(
        module="",
        owns=_is_any_other_array,
        fuses_inner_products=lambda array: True,
        takes_out=lambda _, arrays: all(type(array) is np.ndarray for array in arrays),
    ),
)


def framework_of(array: Any) -> tuple[Framework, Any] | None:
    """Return the framework that an array belongs to and its loaded module, or None for what is no array."""
    for framework in _ROWS:
        module = sys.modules.get(framework.module)
        if (module is not None or not framework.module) and framework.owns(module, array):
            return framework, module
    return None


def is_array(value: Any) -> bool:
    """Whether a value is an array of a known framework."""
    # Containers first: torch.compile cannot trace what array-api-compat asks of them.
    return not isinstance(value, (dict, list, tuple)) and framework_of(value) is not None
