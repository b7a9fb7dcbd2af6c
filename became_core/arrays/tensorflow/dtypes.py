"""The dtypes of the Array API on TensorFlow: their names, kinds, promotion and limits.

Convention: as the standard says; a Python number beside a tensor takes the tensor's dtype.
"""

import importlib
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "astype",
    "bfloat16",
    "bool",
    "complex64",
    "complex128",
    "finfo",
    "float16",
    "float32",
    "float64",
    "iinfo",
    "int8",
    "int16",
    "int32",
    "int64",
    "isdtype",
    "result_type",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]

# Not import statements: the core imports no framework, and only TensorFlow's own tensors ask for this package.
tf: Any = importlib.import_module("tensorflow")
# On which TensorFlow depends: NumPy's own ``finfo`` knows no bfloat16.
ml_dtypes: Any = importlib.import_module("ml_dtypes")

# In plain names, for a module that star-imports these would lose the built-in ``bool``.
int8, int16, int32, int64 = tf.int8, tf.int16, tf.int32, tf.int64
uint8, uint16, uint32, uint64 = tf.uint8, tf.uint16, tf.uint32, tf.uint64
float16, bfloat16, float32, float64 = tf.float16, tf.bfloat16, tf.float32, tf.float64
complex64, complex128 = tf.complex64, tf.complex128

_KINDS: dict[str, Any] = {
    "bool": lambda dtype: dtype.is_bool,
    "signed integer": lambda dtype: dtype.is_integer and not dtype.is_unsigned,
    "unsigned integer": lambda dtype: dtype.is_integer and dtype.is_unsigned,
    "integral": lambda dtype: dtype.is_integer,
    "real floating": lambda dtype: dtype.is_floating,
    "complex floating": lambda dtype: dtype.is_complex,
    "numeric": lambda dtype: dtype.is_integer or dtype.is_floating or dtype.is_complex,
}


class Finfo(NamedTuple):
    """Limits of a floating-point dtype, as the standard names them."""

    bits: int
    eps: float
    max: float
    min: float
    smallest_normal: float
    dtype: Any


class Iinfo(NamedTuple):
    """Limits of an integer dtype, as the standard names them."""

    bits: int
    max: int
    min: int
    dtype: Any


def is_tensor(value: Any) -> Any:
    """Whether a value is a tensor (eager or symbolic) or a variable, not a Python number."""
    return isinstance(value, tf.Tensor | tf.Variable)


def isdtype(dtype: Any, kind: Any) -> Any:
    """Whether a dtype is of a kind ("real floating"), is a given dtype, or is any of a tuple of these."""
    if isinstance(kind, tuple):
        return any(isdtype(dtype, each) for each in kind)
    return _KINDS[kind](dtype) if isinstance(kind, str) else dtype == kind


def result_type(*arrays_and_dtypes: Any) -> Any:
    """Return the dtype that these tensors, dtypes and Python numbers are promoted to."""
    # NumPy's promotion is the standard's, with Python numbers weak, and ml_dtypes teaches it bfloat16.
    return tf.as_dtype(np.result_type(*(_as_numpy(each) for each in arrays_and_dtypes)))


def _as_numpy(value: Any) -> Any:
    if isinstance(value, int | float | complex):
        return value
    return np.dtype((value.dtype if is_tensor(value) else tf.as_dtype(value)).as_numpy_dtype)


def finfo(dtype: Any) -> Finfo:
    """Return the limits of a floating-point dtype, or of a tensor's."""
    dtype = dtype.dtype if is_tensor(dtype) else tf.as_dtype(dtype)
    info = ml_dtypes.finfo(dtype.as_numpy_dtype)
    eps, largest, least, normal = (float(limit) for limit in (info.eps, info.max, info.min, info.smallest_normal))
    return Finfo(info.bits, eps, largest, least, normal, dtype.real_dtype)


def iinfo(dtype: Any) -> Iinfo:
    """Return the limits of an integer dtype, or of a tensor's."""
    dtype = dtype.dtype if is_tensor(dtype) else tf.as_dtype(dtype)
    return Iinfo(8 * dtype.size, int(dtype.max), int(dtype.min), dtype)


def astype(x: Any, dtype: Any, /, *, copy: Any = True) -> Any:
    """Return a tensor in another dtype; tensors being immutable, ``copy`` plays no part."""
    return tf.cast(tf.convert_to_tensor(x), dtype)  # of a variable, its value now


def promoted(*values: Any) -> list[Any]:
    """Return tensors and Python numbers as tensors of their promoted dtype."""
    dtype = result_type(*values)
    # A cast of a Python number would go by way of float32.
    return [tf.cast(x, dtype) if is_tensor(x) else tf.constant(x, dtype) for x in values]


bool = tf.bool  # the last line, so that above it the name is the built-in one's
