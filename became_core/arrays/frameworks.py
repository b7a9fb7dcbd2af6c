"""What tells the frameworks apart: the one table of the package that knows them by name.

Convention: a framework is looked up among the loaded modules, so none is imported that nobody uses, and what no row
claims is left to array-api-compat (NumPy, CuPy, array-api-strict and whatever else has ``__array_namespace__``).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat

from became_core.arrays.values import introduce_to_jax

__all__ = ["Framework", "framework_of", "is_array"]


def _own_device(array: Any) -> Any:
    return array.device


# What computes a step for each whole piece of so many elements of flat arrays, and returns the results stacked.
Loop = Callable[[Any, Callable[[list[Any]], Any], Sequence[Any], int], Any]


def _jax_loop(jax: Any, step: Callable[[list[Any]], Any], arrays: Sequence[Any], size: int) -> Any:
    # The pieces are sliced within the loop: what is sliced before it is copied as a whole.
    def at(index: Any) -> Any:
        return step([jax.lax.dynamic_slice_in_dim(array, index * size, size) for array in arrays])

    return jax.lax.map(at, jax.numpy.arange(arrays[0].shape[0] // size))


def _tensorflow_loop(tensorflow: Any, step: Callable[[list[Any]], Any], arrays: Sequence[Any], size: int) -> Any:
    def at(index: Any) -> Any:
        return step([tensorflow.slice(array, [index * size], [size]) for array in arrays])

    # The dtype must be known beforehand: that of a first result, of which nothing else is kept.
    indices = tensorflow.range(arrays[0].shape[0] // size)
    return tensorflow.map_fn(at, indices, fn_output_signature=at(0).dtype)


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
        loop: the compiler's own, (module, step, flat arrays, size) -> the step's results for one piece of this size
            after the other, stacked; None where the compiler computes what is summed as it sums it, without a loop.
    """

    module: str
    owns: Callable[[Any, Any], bool]
    namespace: Callable[[Any], Any] = array_api_compat.array_namespace
    device: Callable[[Any], Any] = array_api_compat.device
    has_values: Callable[[Any, Any], bool] = lambda module, array: True
    loop: Loop | None = None


def _torch_namespace(_: Any) -> Any:
    # Not by way of array_api_compat.array_namespace: torch.compile warns of its caches.
    import array_api_compat.torch

    return array_api_compat.torch


def _torch_has_values(torch: Any, array: Any) -> bool:
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(array))


def _jax_namespace(array: Any) -> Any:
    introduce_to_jax(sys.modules["jax"])
    return array_api_compat.array_namespace(array)


def _tensorflow_namespace(_: Any) -> Any:
    import became_core.arrays.tensorflow as xp

    return xp


def _is_any_other_array(_: Any, value: Any) -> bool:
    # The type's attribute, where array-api-compat asks for the object's: an nnx.Param lends its value's, and is a node.
    others = array_api_compat.is_numpy_array(value) or array_api_compat.is_cupy_array(value)
    return others or hasattr(type(value), "__array_namespace__")


_ROWS = (
    # PyTorch is first: torch.compile traces the rows before its own, and can trace none of the others.
    Framework(
        module="torch",
        owns=lambda torch, array: isinstance(array, torch.Tensor),
        namespace=_torch_namespace,
        device=_own_device,
        has_values=_torch_has_values,
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
        loop=_tensorflow_loop,
    ),
    Framework(
        module="jax",
        owns=lambda jax, array: isinstance(array, jax.Array),
        namespace=_jax_namespace,
        has_values=lambda jax, array: not isinstance(array, jax.core.Tracer),
        loop=_jax_loop,
    ),
    Framework(
        module="dask.array",
        owns=lambda dask, array: isinstance(array, dask.Array),
        has_values=lambda dask, array: False,
    ),
    Framework(module="", owns=_is_any_other_array),
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
