"""Functions of each element, and of each pair of elements; pairs are promoted and broadcast."""

from typing import Any

from became_core.arrays.tensorflow.dtypes import isdtype, promoted, tf

__all__ = [
    "abs",
    "clip",
    "exp",
    "isfinite",
    "isnan",
    "log",
    "logical_and",
    "logical_not",
    "logical_or",
    "maximum",
    "minimum",
    "sign",
    "sqrt",
    "square",
    "tanh",
    "where",
]


def tanh(x: Any, /) -> Any:
    """Return the hyperbolic tangent."""
    return tf.tanh(x)


def exp(x: Any, /) -> Any:
    """Return e to the power of x."""
    return tf.exp(x)


def log(x: Any, /) -> Any:
    """Return the natural logarithm."""
    return tf.math.log(x)


def sqrt(x: Any, /) -> Any:
    """Return the square root."""
    return tf.sqrt(x)


def square(x: Any, /) -> Any:
    """Return x times x."""
    return tf.square(x)


def abs(x: Any, /) -> Any:
    """Return the absolute value."""
    return tf.abs(x)


def sign(x: Any, /) -> Any:
    """Return -1, 0 or 1, and NaN for NaN."""
    return tf.sign(x)


def isfinite(x: Any, /) -> Any:
    """Whether elements are neither infinite nor NaN; integers always are."""
    return tf.math.is_finite(x) if isdtype(x.dtype, "real floating") else tf.ones_like(x, tf.bool)


def isnan(x: Any, /) -> Any:
    """Whether elements are NaN; integers never are."""
    return tf.math.is_nan(x) if isdtype(x.dtype, "real floating") else tf.zeros_like(x, tf.bool)


def logical_not(x: Any, /) -> Any:
    """Return the negation of booleans."""
    return tf.logical_not(x)


def logical_and(x1: Any, x2: Any, /) -> Any:
    """Whether both booleans are true."""
    return tf.logical_and(x1, x2)


def logical_or(x1: Any, x2: Any, /) -> Any:
    """Whether one of the booleans is true."""
    return tf.logical_or(x1, x2)


def maximum(x1: Any, x2: Any, /) -> Any:
    """Return the larger of each pair, NaN where one is."""
    return tf.maximum(*promoted(x1, x2))


def minimum(x1: Any, x2: Any, /) -> Any:
    """Return the smaller of each pair, NaN where one is."""
    return tf.minimum(*promoted(x1, x2))


def clip(x: Any, /, min: Any = None, max: Any = None) -> Any:
    """Return x within [min, max], each a number, a tensor or None for no bound; in the dtype of x."""
    if min is not None:
        x = tf.maximum(x, tf.cast(min, x.dtype))
    if max is not None:
        x = tf.minimum(x, tf.cast(max, x.dtype))
    return tf.convert_to_tensor(x)


def where(condition: Any, x1: Any, x2: Any, /) -> Any:
    """Return the element of x1 where the condition is true, else that of x2."""
    return tf.where(condition, *promoted(x1, x2))
