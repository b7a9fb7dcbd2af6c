"""Reductions along an axis, several (a tuple), or all (None).

Convention: integers and booleans are summed in int64, unsigned ones in uint64; floats in their own dtype.
"""

from typing import Any

from became_core.arrays.tensorflow.dtypes import isdtype, tf

__all__ = ["all", "any", "argmax", "argmin", "count_nonzero", "cumulative_sum", "max", "mean", "min", "sum"]


def _axes(axis: Any) -> Any:
    return list(axis) if isinstance(axis, tuple) else axis


def _summable(x: Any, dtype: Any) -> Any:
    if dtype is None and isdtype(x.dtype, "unsigned integer"):
        dtype = tf.uint64
    elif dtype is None and isdtype(x.dtype, ("bool", "integral")):
        dtype = tf.int64
    return x if dtype is None else tf.cast(x, dtype)


def sum(x: Any, /, *, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Any:
    """Return the sum."""
    return tf.reduce_sum(_summable(x, dtype), axis=_axes(axis), keepdims=keepdims)


def mean(x: Any, /, *, axis: Any = None, keepdims: bool = False) -> Any:
    """Return the mean."""
    return tf.reduce_mean(x, axis=_axes(axis), keepdims=keepdims)


def max(x: Any, /, *, axis: Any = None, keepdims: bool = False) -> Any:
    """Return the largest element."""
    return tf.reduce_max(x, axis=_axes(axis), keepdims=keepdims)


def min(x: Any, /, *, axis: Any = None, keepdims: bool = False) -> Any:
    """Return the smallest element."""
    return tf.reduce_min(x, axis=_axes(axis), keepdims=keepdims)


def all(x: Any, /, *, axis: Any = None, keepdims: bool = False) -> Any:
    """Whether all elements are true, which is to say not 0."""
    return tf.reduce_all(tf.cast(x, tf.bool), axis=_axes(axis), keepdims=keepdims)


def any(x: Any, /, *, axis: Any = None, keepdims: bool = False) -> Any:
    """Whether an element is true, which is to say not 0."""
    return tf.reduce_any(tf.cast(x, tf.bool), axis=_axes(axis), keepdims=keepdims)


def count_nonzero(x: Any, /, *, axis: Any = None, keepdims: bool = False) -> Any:
    """Return how many elements are not 0, as int64."""
    return tf.math.count_nonzero(x, axis=_axes(axis), keepdims=keepdims)


def argmax(x: Any, /, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """Return the index of the first largest element, as int64."""
    return _arg(tf.argmax, x, axis, keepdims)


def argmin(x: Any, /, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """Return the index of the first smallest element, as int64."""
    return _arg(tf.argmin, x, axis, keepdims)


def _arg(function: Any, x: Any, axis: int | None, keepdims: bool) -> Any:
    if axis is not None:
        found = function(x, axis)
        return tf.expand_dims(found, axis) if keepdims else found
    found = function(tf.reshape(x, [-1]), 0)
    return tf.reshape(found, [1] * len(x.shape)) if keepdims else found


def cumulative_sum(x: Any, /, *, axis: int | None = None, dtype: Any = None, include_initial: bool = False) -> Any:
    """Return the running sums along an axis, which may be left out of a vector only."""
    axis = (0 if axis is None else axis) % len(x.shape)
    x = _summable(x, dtype)
    if include_initial:
        x = tf.pad(x, [[int(each == axis), 0] for each in range(len(x.shape))])
    return tf.cumsum(x, axis)
