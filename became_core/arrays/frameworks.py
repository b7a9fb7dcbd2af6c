"""What differs between the frameworks: the one table of the package that knows them by name.

Convention: a framework is looked up among the loaded modules, so that none is imported that nobody uses. What no row of
the table claims is left to array-api-compat (NumPy, array-api-strict and all that has ``__array_namespace__``).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter, methodcaller
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from became_core.arrays.values import introduce_to_jax, introduce_to_torch

__all__ = ["Framework", "framework_of", "is_array", "shards_among", "times_itself"]

# (module, function, arrays, starts, length) -> what ``function`` returns for pieces of flat arrays, each of so many
# elements from one of the starts, stacked. The pieces are cut within the compiler's loop: what is cut before is copied.
Loop = Callable[[Any, Callable[[list[Any]], Any], Sequence[Any], range, int], Any]


def times_itself(array: Any) -> Any:
    """Return an array's square."""
    return array * array


@dataclass(frozen=True)
class Framework:
    """How arrays of one framework are recognised and what may be asked of them.

    Attributes:
        module: the module that must be loaded for there to be any such array; "" for one that always is.
        owns: (module, object) -> whether the object is such an array, a traced one included.
        namespace: array -> its Array API namespace.
        device: array -> the device it lives on, as its framework calls it.
        have_values: (module, arrays) -> whether the numbers of all these arrays can be looked at now: none is traced,
            and looking at them would not compute a lazy graph.
        loop: module -> a loop of the compiler, for compilers that write every summand to memory before they sum, as XLA
            does on a processor; None where the compiler computes the summands as it sums them, as XLA does on a GPU.
            The default device decides, because a traced array knows no other.
        compiles: module -> the decorator that compiles a function of arrays which have values; None where operations
            are carried out one by one. JAX needs it: without it, every operation on every shape is compiled by itself.
        on_cpu: array -> whether a processor computes with it.
        slab: how many elements of such arrays are summed at a time where values exist. With its intermediate results a
            slab should stay within the processor's cache.
        dot: (namespace, left, right) -> the inner product of two flat arrays, without their products in memory; None if
            the framework has no such function that is also accurate.
        add_product: (total, left, right) adds left * right to the total, in its memory, as the framework also does in
            a slice; None if it does not, or if that takes as long as to sum the products.
        square: array -> its square, which may use the array's memory, so that one slab less has to fit the cache.
        reductions: the sum and the least element of a flat array, each as an array [1], which many can be joined from
            more quickly than from 0-d arrays; None for the framework's usual ones.
        eigh: symmetric matrices on a processor, with values -> eigenvalues and eigenvectors, in less time than by the
            namespace; None where that is as quick.
        lerp: (module, start, end, weight) -> start + weight * (end - start) in one pass, computed from the nearer end,
            so that both ends are exact; None if the framework has no such function.
        on_host: array -> its numbers in NumPy, from whatever device; those of a bfloat16 of PyTorch in float32.
        place: array -> where it lies, if the framework refuses to compute with arrays from other places; None if it
            does not.
        are_dense: (module, arrays) -> whether all of these have all their elements: none is sparse or masked.
        shards: the module that knows which part of such arrays this process has, for arrays that are shared by
            processes; None for all others. It is imported when there is such an array.
        spreads: module -> whether a compiler may spread such arrays over several devices, which a trace does not show.
            Then none is flattened or cut into pieces: that would gather what another device has.
    """

    module: str
    owns: Callable[[Any, Any], bool]
    namespace: Callable[[Any], Any] = array_api_compat.array_namespace
    device: Callable[[Any], Any] = array_api_compat.device
    have_values: Callable[[Any, Sequence[Any]], bool] = lambda module, arrays: True
    loop: Callable[[Any], Loop | None] = lambda module: None
    compiles: Callable[[Any], Callable[..., Any]] | None = None
    on_cpu: Callable[[Any], bool] = lambda array: True
    slab: int = 2**18
    dot: Callable[[Any, Any, Any], Any] | None = None
    add_product: Callable[[Any, Any, Any], None] | None = None
    square: Callable[[Any], Any] = times_itself
    reductions: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None
    eigh: Callable[[Any], tuple[Any, Any]] | None = None
    lerp: Callable[[Any, Any, Any, Any], Any] | None = None
    on_host: Callable[[Any], NDArray[Any]] = np.asarray
    place: Callable[[Any], Any] = lambda array: None
    are_dense: Callable[[Any, Sequence[Any]], bool] = lambda module, arrays: True
    shards: str | None = None
    spreads: Callable[[Any], bool] = lambda module: False


def _torch_namespace(_: Any) -> Any:
    # Not by way of array_api_compat.array_namespace: torch.compile warns of its caches.
    import array_api_compat.torch

    introduce_to_torch(sys.modules["torch"])
    return array_api_compat.torch


def _torch_have_values(torch: Any, arrays: Sequence[Any]) -> bool:
    if torch.compiler.is_compiling():
        return False
    try:
        # A tensor under torch.func (vmap, grad, jvp) wraps another one and has no memory of its own to point to.
        for array in arrays:
            array.data_ptr()
    except RuntimeError:
        return False
    return True


def _torch_on_host(array: Any) -> NDArray[Any]:
    # NumPy has no bfloat16.
    return np.asarray((array.float() if array.dtype is sys.modules["torch"].bfloat16 else array).cpu())


def _jax_device(array: Any) -> Any:
    # Of an array that is cut among devices it is all of them, each with the whole: another shape may not be so cut.
    place, sharding = array_api_compat.device(array), sys.modules["jax"].sharding
    return sharding.NamedSharding(place.mesh, sharding.PartitionSpec()) if hasattr(place, "mesh") else place


def _jax_place(array: Any) -> Any:
    # What is not committed to its devices is moved to where the others are. Nothing is known of what is traced.
    if isinstance(array, sys.modules["jax"].core.Tracer) or not array.committed:
        return None
    return ", ".join(sorted(map(str, array.devices())))


def _jax_namespace(array: Any) -> Any:
    introduce_to_jax(sys.modules["jax"])
    return array_api_compat.array_namespace(array)


def _jax_loop(jax: Any, function: Callable[[list[Any]], Any], arrays: Sequence[Any], starts: range, length: int) -> Any:
    cut, numbers = jax.lax.dynamic_slice_in_dim, jax.numpy.arange(starts.start, starts.stop, starts.step)
    return jax.lax.map(lambda start: function([cut(array, start, length) for array in arrays]), numbers)


def _tensorflow_namespace(_: Any) -> Any:
    import became_core.arrays.tensorflow as xp

    return xp


def _tensorflow_loop(
    tensorflow: Any, function: Callable[[list[Any]], Any], arrays: Sequence[Any], starts: range, length: int
) -> Any:
    def at(start: Any) -> Any:
        return function([tensorflow.slice(array, [start], [length]) for array in arrays])

    numbers = tensorflow.range(starts.start, starts.stop, starts.step)
    # The dtype must be known beforehand: it is that of a first result, of which nothing else is used.
    return tensorflow.map_fn(at, numbers, fn_output_signature=at(starts.start).dtype)


def _vecdot_of_pieces(xp: Any, left: Any, right: Any) -> Any:
    """Return the inner product by ``vecdot``, which writes no products, but may add them one after the other.

    So it is given pieces of 1,024, whose results are summed in a tree.
    """
    length = 2**10
    count = left.shape[0] // length
    whole = [xp.reshape(array[: count * length], (count, length)) for array in (left, right)]
    return xp.sum(xp.vecdot(*whole)) + xp.vecdot(left[count * length :], right[count * length :])


def _add_in_place(total: Any, left: Any, right: Any) -> None:
    total += left * right


_ROWS = (
    # PyTorch's are first: torch.compile traces the rows before its own, and can trace none of the others.
    Framework(
        module="torch.distributed.tensor",
        owns=lambda distributed, array: isinstance(array, distributed.DTensor),
        namespace=_torch_namespace,
        device=lambda array: array.device,
        on_cpu=lambda array: array.device.type == "cpu",
        lerp=lambda distributed, start, end, weight: sys.modules["torch"].lerp(start, end, weight),
        on_host=lambda array: _torch_on_host(array.detach().full_tensor()),
        place=lambda array: array.device,
        shards="became_core.arrays.dtensor",
    ),
    Framework(
        module="torch",
        owns=lambda torch, array: isinstance(array, torch.Tensor),
        namespace=_torch_namespace,
        device=lambda array: array.device,
        have_values=_torch_have_values,
        on_cpu=lambda array: array.device.type == "cpu",
        add_product=lambda total, left, right: total.addcmul_(left, right),
        square=lambda array: array.square_(),
        reductions=(methodcaller("sum", 0, True), methodcaller("amin", 0, True)),
        lerp=lambda torch, start, end, weight: torch.lerp(start, end, weight),
        on_host=lambda array: _torch_on_host(array.detach()),
        place=attrgetter("device"),
        are_dense=lambda torch, arrays: all(array.layout is torch.strided for array in arrays),
    ),
    Framework(
        module="tensorflow",
        owns=lambda tensorflow, array: isinstance(array, tensorflow.Tensor | tensorflow.Variable),
        namespace=_tensorflow_namespace,
        device=lambda array: array.device,
        # A variable that a graph captures is not symbolic, but what is computed from it is.
        have_values=lambda tensorflow, arrays: (
            tensorflow.executing_eagerly() and not any(map(tensorflow.is_symbolic_tensor, arrays))
        ),
        loop=lambda tensorflow: None if tensorflow.config.list_physical_devices("GPU") else _tensorflow_loop,
        on_cpu=lambda array: "GPU" not in array.device,
        eigh=lambda array: _tensorflow_namespace(array).eigh_by_numpy(array),
    ),
    Framework(
        module="jax",
        owns=lambda jax, array: isinstance(array, jax.Array),
        namespace=_jax_namespace,
        device=_jax_device,
        have_values=lambda jax, arrays: not any(isinstance(array, jax.core.Tracer) for array in arrays),
        loop=lambda jax: _jax_loop if jax.default_backend() == "cpu" and jax.device_count() == 1 else None,
        compiles=lambda jax: jax.jit,
        spreads=lambda jax: jax.device_count() > 1,
        on_cpu=lambda array: all(device.platform == "cpu" for device in array.devices()),
        place=_jax_place,
    ),
    Framework(
        module="dask.array",
        owns=lambda dask, array: isinstance(array, dask.Array),
        have_values=lambda dask, arrays: False,
    ),
    Framework(
        module="cupy",
        owns=lambda cupy, array: isinstance(array, cupy.ndarray),
        on_cpu=lambda array: False,
        dot=_vecdot_of_pieces,
        on_host=lambda array: array.get(),
        place=lambda array: array.device,
    ),
    Framework(
        module="numpy",
        owns=lambda _, array: array_api_compat.is_numpy_array(array),
        dot=_vecdot_of_pieces,
        add_product=_add_in_place,
        are_dense=lambda numpy, arrays: not any(isinstance(array, numpy.ma.MaskedArray) for array in arrays),
    ),
    # Any other library of the array API standard. The attribute is the type's, where array-api-compat asks for the
    # object's: an nnx.Param has its value's, and is a node.
    Framework(
        module="",
        owns=lambda _, array: hasattr(type(array), "__array_namespace__"),
        dot=_vecdot_of_pieces,
    ),
)


def framework_of(array: Any) -> tuple[Framework, Any] | None:
    """Return the framework that an array belongs to and its loaded module, or None for what is no array."""
    for framework in _ROWS:
        module = sys.modules.get(framework.module)
        if (module is not None or not framework.module) and framework.owns(module, array):
            return framework, module
    return None


def shards_among(arrays: Sequence[Any]) -> Any | None:
    """Return the module that knows this process's parts of arrays shared by processes; None if there is no such one."""
    for framework in _ROWS:
        module = sys.modules.get(framework.module)
        if framework.shards and module is not None and any(framework.owns(module, array) for array in arrays):
            return import_module(framework.shards)
    return None


def is_array(value: Any) -> bool:
    """Whether a value is an array of a known framework."""
    # Containers first: torch.compile cannot trace what array-api-compat asks of them.
    return not isinstance(value, (dict, list, tuple)) and framework_of(value) is not None
