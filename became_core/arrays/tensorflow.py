"""The Array API on TensorFlow, which array-api-compat does not know: the functions that the core uses, and no others.

``tf.experimental.numpy`` is not used, because it makes float64 of Python numbers and places nothing on a device. A
function of TensorFlow that behaves as the standard says is given its standard name; one that does not is wrapped.

Convention: names, keywords, promotion and results are the standard's. Arrays are eager and symbolic tensors and
variables. Three things stay TensorFlow's own: operators do not promote dtypes (use ``astype``), tensors have no ``.T``
(use ``matrix_transpose``), and XLA's ``max`` and ``min`` may pass over a NaN. Default dtypes: float32 and int64.
"""

import contextlib
import importlib
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import numpy as np

# Not import statements: the core imports no framework, and only TensorFlow's own tensors ask for this module. NumPy's
# own ``finfo`` does not know bfloat16; ml_dtypes, on which TensorFlow depends, does.
tf: Any = importlib.import_module("tensorflow")
ml_dtypes: Any = importlib.import_module("ml_dtypes")

__all__ = ["inf", "nan"]

int8, int16, int32, int64 = tf.int8, tf.int16, tf.int32, tf.int64
uint8, uint16, uint32, uint64 = tf.uint8, tf.uint16, tf.uint32, tf.uint64
float16, bfloat16, float32, float64 = tf.float16, tf.bfloat16, tf.float32, tf.float64
complex64, complex128 = tf.complex64, tf.complex128

exp, log, log1p, sqrt, square, tanh = tf.exp, tf.math.log, tf.math.log1p, tf.sqrt, tf.square, tf.tanh
acos, cos = tf.acos, tf.cos
isfinite = tf.math.is_finite
logical_and, logical_not = tf.logical_and, tf.logical_not
reshape, expand_dims, broadcast_to = tf.reshape, tf.expand_dims, tf.broadcast_to
permute_dims, matrix_transpose = tf.transpose, tf.linalg.matrix_transpose


def _is_tensor(value: Any) -> Any:
    return isinstance(value, tf.Tensor | tf.Variable)


def isdtype(dtype: Any, kind: Any) -> Any:
    """Whether a dtype is of a kind ("bool", "integral", "real floating"), of one of several, or is a given dtype."""
    if isinstance(kind, tuple):
        return True in [isdtype(dtype, one) for one in kind]
    kinds = {"bool": dtype.is_bool, "integral": dtype.is_integer, "real floating": dtype.is_floating}
    return kinds[kind] if isinstance(kind, str) else dtype == kind


def result_type(*arrays_and_dtypes: Any) -> Any:
    """Return the dtype that these tensors, dtypes and Python numbers are promoted to."""

    def as_numpy(value: Any) -> Any:
        if isinstance(value, int | float):
            return value
        return np.dtype((value.dtype if _is_tensor(value) else tf.as_dtype(value)).as_numpy_dtype)

    # NumPy's promotion is the standard's, with Python numbers weak, and ml_dtypes teaches it bfloat16.
    return tf.as_dtype(np.result_type(*map(as_numpy, arrays_and_dtypes)))


def finfo(dtype: Any) -> Any:
    """Return the limits of a floating-point dtype: bits, eps, max, min, smallest_normal."""
    info = ml_dtypes.finfo(tf.as_dtype(dtype).as_numpy_dtype)
    # As Python numbers, which take the dtype of whatever tensor they meet.
    limits = {name: float(getattr(info, name)) for name in ("eps", "max", "min", "smallest_normal")}
    return SimpleNamespace(bits=info.bits, **limits)


def iinfo(dtype: Any) -> Any:
    """Return the limits of an integer dtype: bits, max, min."""
    return np.iinfo(tf.as_dtype(dtype).as_numpy_dtype)


def astype(x: Any, dtype: Any, /, *, copy: Any = True) -> Any:
    """Return a tensor in another dtype; ``copy`` has no effect, because tensors are immutable."""
    return tf.cast(tf.convert_to_tensor(x), dtype)  # of a variable, its value now


def _promoted(*values: Any) -> list[Any]:
    """Return tensors and Python numbers as tensors of their promoted dtype."""
    dtype = result_type(*values)
    # A cast of a Python number would go by way of float32.
    return [tf.cast(x, dtype) if _is_tensor(x) else tf.constant(x, dtype) for x in values]


def _on(device: Any) -> Any:
    """A scope that places tensors; None, or the "" of a symbolic tensor, leaves the choice to TensorFlow."""
    return tf.device(device) if device else contextlib.nullcontext()


def asarray(obj: Any, /, *, dtype: Any = None, device: Any = None) -> Any:
    """Return numbers, nested lists, NumPy arrays or tensors as a tensor, which shares no memory with them."""
    with _on(device):
        if _is_tensor(obj):
            return tf.identity(obj) if dtype is None else astype(obj, dtype)
        if isinstance(obj, np.ndarray | np.generic):
            return tf.constant(obj) if dtype is None else astype(tf.constant(obj), dtype)
        if dtype is None:
            dtype = {"i": int64, "f": float32}.get(np.asarray(obj).dtype.kind)
        return tf.convert_to_tensor(obj, dtype)


def full(shape: Any, fill_value: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """Return a tensor of one value, of the value's default dtype if none is given."""
    with _on(device):
        return tf.fill((shape,) if isinstance(shape, int) else shape, asarray(fill_value, dtype=dtype))


def zeros(shape: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """Return zeros."""
    with _on(device):
        return tf.zeros((shape,) if isinstance(shape, int) else shape, dtype or float32)


def ones(shape: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """Return ones."""
    with _on(device):
        return tf.ones((shape,) if isinstance(shape, int) else shape, dtype or float32)


def full_like(x: Any, /, fill_value: Any, *, dtype: Any = None) -> Any:
    """Return one value in a tensor's shape."""
    return tf.fill(tf.shape(x), asarray(fill_value, dtype=dtype or x.dtype))


def zeros_like(x: Any, /, *, dtype: Any = None) -> Any:
    """Return zeros in a tensor's shape."""
    return tf.zeros_like(x, dtype)


def ones_like(x: Any, /, *, dtype: Any = None) -> Any:
    """Return ones in a tensor's shape."""
    return tf.ones_like(x, dtype)


def arange(stop: int, /, *, dtype: Any = None, device: Any = None) -> Any:
    """Return the integers from 0 up to stop, which is left out."""
    with _on(device):
        return tf.range(stop, dtype=dtype or int64)


def eye(size: int, /, *, dtype: Any = None, device: Any = None) -> Any:
    """Return the identity matrix."""
    with _on(device):
        return tf.eye(size, dtype=dtype or float32)


def where(condition: Any, x1: Any, x2: Any, /) -> Any:
    """Return the element of x1 where the condition is true, else that of x2."""
    return tf.where(condition, *_promoted(x1, x2))


def maximum(x1: Any, x2: Any, /) -> Any:
    """Return the greater of two elements."""
    return tf.maximum(*_promoted(x1, x2))


def clip(x: Any, /, min: Any = None, max: Any = None) -> Any:
    """Return x within [min, max], each a number, a tensor or None for no bound; in the dtype of x."""
    x = x if min is None else tf.maximum(x, tf.cast(min, x.dtype))
    return tf.convert_to_tensor(x if max is None else tf.minimum(x, tf.cast(max, x.dtype)))


def concat(arrays: Any, /, *, axis: int = 0) -> Any:
    """Return arrays joined along an axis."""
    return tf.concat(_promoted(*arrays), axis)


def stack(arrays: Any, /, *, axis: int = 0) -> Any:
    """Return arrays joined along a new axis."""
    return tf.stack(_promoted(*arrays), axis)


def flip(x: Any, /, *, axis: int | None = None) -> Any:
    """Return x reversed along an axis, or along all."""
    return tf.reverse(x, list(range(len(x.shape))) if axis is None else [axis])


def take(x: Any, indices: Any, /, *, axis: int = 0) -> Any:
    """Return the slices at these indices, of which negative ones count from the end."""
    return tf.gather(x, _from_start(indices, tf.shape(x)[axis]), axis=axis)


def take_along_axis(x: Any, indices: Any, /, *, axis: int = -1) -> Any:
    """Return the elements at these indices, an own index for each place; other axes are broadcast."""
    last = list(range(len(x.shape)))
    last[axis], last[-1] = last[-1], last[axis]  # exchanges the axis and the last one, there and back
    x, indices = tf.transpose(x, last), tf.transpose(_from_start(indices, tf.shape(x)[axis]), last)
    batch = tf.broadcast_dynamic_shape(tf.shape(x)[:-1], tf.shape(indices)[:-1])
    known = tf.broadcast_static_shape(x.shape[:-1], indices.shape[:-1]).concatenate(indices.shape[-1:])
    x, indices = (tf.broadcast_to(part, tf.concat([batch, tf.shape(part)[-1:]], 0)) for part in (x, indices))
    taken = tf.gather(x, indices, batch_dims=len(last) - 1, axis=-1)
    return tf.transpose(tf.ensure_shape(taken, known), last)  # what is known of the shape would else be lost


def _from_start(indices: Any, length: Any) -> Any:
    return tf.where(indices < 0, indices + tf.cast(length, indices.dtype), indices)


def matmul(x1: Any, x2: Any, /) -> Any:
    """Return the matrix product; a vector is a row on the left and a column on the right."""
    x1, x2 = _promoted(x1, x2)
    row, column = len(x1.shape) == 1, len(x2.shape) == 1
    product = tf.matmul(x1[None, :] if row else x1, x2[:, None] if column else x2)
    if column:
        product = product[..., 0]
    return product[..., 0] if row and column else product[..., 0, :] if row else product


def argsort(x: Any, /, *, axis: int = -1, descending: Any = False, stable: Any = True) -> Any:
    """Return the indices that sort x along an axis, as int64; equal elements stay in their order."""
    direction = "DESCENDING" if descending else "ASCENDING"
    return tf.cast(tf.argsort(x, axis=axis, direction=direction, stable=stable), int64)


def searchsorted(x1: Any, x2: Any, /) -> Any:
    """Return where x2's elements would be put into x1, a sorted vector, on the left of equal ones, as int64."""
    x1, x2 = _promoted(x1, x2)
    return tf.reshape(tf.searchsorted(x1, tf.reshape(x2, [-1]), out_type=int64), tf.shape(x2))


def cumulative_sum(x: Any, /, *, axis: int = 0) -> Any:
    """Return the running sums along an axis."""
    return tf.cumsum(x, axis)


def argmax(x: Any, /, *, axis: int) -> Any:
    """Return the indices of the first largest elements along an axis, as int64."""
    return tf.argmax(x, axis)


def mean(x: Any, /) -> Any:
    """Return the mean of all elements."""
    return tf.reduce_mean(x)


def count_nonzero(x: Any, /) -> Any:
    """Return how many elements are not 0, as int64."""
    return tf.math.count_nonzero(x)


def sum(x: Any, /, *, axis: Any = None, keepdims: Any = False) -> Any:
    """Return the sum along an axis, several (a tuple) or all; integers and booleans are summed in int64."""
    return tf.reduce_sum(x if x.dtype.is_floating else tf.cast(x, int64), axis=axis, keepdims=keepdims)


def max(x: Any, /, *, axis: Any = None, keepdims: Any = False) -> Any:
    """Return the largest element along an axis, several (a tuple) or all."""
    return tf.reduce_max(x, axis=axis, keepdims=keepdims)


def min(x: Any, /, *, axis: Any = None, keepdims: Any = False) -> Any:
    """Return the smallest element along an axis, several (a tuple) or all."""
    return tf.reduce_min(x, axis=axis, keepdims=keepdims)


def all(x: Any, /, *, axis: Any = None) -> Any:
    """Whether all elements are true, which is to say not 0, along an axis, several (a tuple) or all."""
    return tf.reduce_all(tf.cast(x, tf.bool), axis=axis)


def any(x: Any, /, *, axis: Any = None) -> Any:
    """Whether an element is true, which is to say not 0, along an axis, several (a tuple) or all."""
    return tf.reduce_any(tf.cast(x, tf.bool), axis=axis)


def _cholesky(x: Any, /, *, upper: Any = False) -> Any:
    factor = tf.linalg.cholesky(x)
    return tf.linalg.matrix_transpose(factor) if upper else factor


def _solve(x1: Any, x2: Any, /) -> Any:
    """Return the solution of x1 @ x = x2; a one-dimensional x2 is a vector, anything else matrices."""
    x1, x2 = _promoted(x1, x2)
    if len(x2.shape) > 1:
        return tf.linalg.solve(x1, x2)
    return tf.linalg.solve(x1, x2[:, None])[..., 0]


@tf.custom_gradient  # type: ignore[untyped-decorator]
def eigh_by_numpy(x: Any) -> Any:
    """Return what ``linalg.eigh`` does of an eager tensor on a processor, in little more than half the time.

    Gradients are those of ``linalg.eigh``. A ``ForwardAccumulator`` finds no derivative: TensorFlow has none of a
    function with a gradient of its own.
    """
    values, vectors = (tf.convert_to_tensor(result) for result in np.linalg.eigh(x.numpy()))

    def gradient(*upstream: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            own_values, own_vectors = tf.linalg.eigh(x)
            # An eigenvector may have either sign, and the two libraries need not choose the same one.
            signs = tf.sign(tf.reduce_sum(own_vectors * vectors, axis=-2, keepdims=True))
            own_vectors = own_vectors * tf.stop_gradient(signs)
        return tape.gradient((own_values, own_vectors), x, output_gradients=upstream)

    return (values, vectors), gradient


def _qr(x: Any, /, *, mode: str = "reduced") -> Any:
    return tf.linalg.qr(x, full_matrices=mode == "complete")


def _svd(x: Any, /, *, full_matrices: Any = True) -> Any:
    values, left, right = tf.linalg.svd(x, full_matrices=full_matrices)
    return left, values, tf.linalg.matrix_transpose(right)


def _diagonal(x: Any, /) -> Any:
    return tf.linalg.diag_part(x)


def _trace(x: Any, /) -> Any:
    return tf.reduce_sum(tf.linalg.diag_part(x), axis=-1)


def _vector_norm(x: Any, /) -> Any:
    return tf.sqrt(tf.reduce_sum(tf.square(tf.abs(x))))


linalg = SimpleNamespace(
    cholesky=_cholesky,
    diagonal=_diagonal,
    eigh=tf.linalg.eigh,
    eigvalsh=tf.linalg.eigvalsh,
    inv=tf.linalg.inv,
    qr=_qr,
    solve=_solve,
    svd=_svd,
    trace=_trace,
    vector_norm=_vector_norm,
)

abs = tf.abs
bool = tf.bool  # the last line, so that above it the name is the built-in one's
