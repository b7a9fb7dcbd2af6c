"""Tensors made from numbers, lists and NumPy arrays.

Convention: where no dtype is given, floats become float32 and integers int64; ``device`` is TensorFlow's string.
"""

import contextlib
from typing import Any

import numpy as np

from became_core.arrays.tensorflow.dtypes import astype, is_tensor, tf

__all__ = ["arange", "asarray", "eye", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like"]

_DEFAULTS = {"i": tf.int64, "f": tf.float32, "c": tf.complex64}


def _on(device: Any) -> Any:
    """A scope that places tensors; None, or the "" of a symbolic tensor, leaves that to TensorFlow."""
    return tf.device(device) if device else contextlib.nullcontext()


def _shape(shape: Any) -> Any:
    return (shape,) if isinstance(shape, int) else shape


def asarray(obj: Any, /, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> Any:
    """Return numbers, nested lists, NumPy arrays or tensors as a tensor, which shares no memory with them."""
    with _on(device):
        if is_tensor(obj):
            return tf.identity(obj) if dtype is None else astype(obj, dtype)
        if isinstance(obj, np.ndarray | np.generic):
            return tf.constant(obj) if dtype is None else astype(tf.constant(obj), dtype)
        if dtype is None and not any(map(is_tensor, obj if isinstance(obj, list | tuple) else ())):
            dtype = _DEFAULTS.get(np.asarray(obj).dtype.kind)
        return tf.convert_to_tensor(obj, dtype)


def full(shape: Any, fill_value: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """Return a tensor of one value, of the value's default dtype if none is given."""
    with _on(device):
        return tf.fill(_shape(shape), asarray(fill_value, dtype=dtype))


def zeros(shape: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """Return zeros."""
    with _on(device):
        return tf.zeros(_shape(shape), dtype or tf.float32)


def ones(shape: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """Return ones."""
    with _on(device):
        return tf.ones(_shape(shape), dtype or tf.float32)


def full_like(x: Any, /, fill_value: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """Return one value in a tensor's shape."""
    with _on(device):
        return tf.fill(tf.shape(x), asarray(fill_value, dtype=dtype or x.dtype))


def zeros_like(x: Any, /, *, dtype: Any = None, device: Any = None) -> Any:
    """Return zeros in a tensor's shape."""
    with _on(device):
        return tf.zeros_like(x, dtype)


def ones_like(x: Any, /, *, dtype: Any = None, device: Any = None) -> Any:
    """Return ones in a tensor's shape."""
    with _on(device):
        return tf.ones_like(x, dtype)


def arange(start: Any, /, stop: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None) -> Any:
    """Return evenly spaced numbers from start up to stop, which is left out."""
    start, stop = (0, start) if stop is None else (start, stop)
    if dtype is None:
        dtype = tf.float32 if any(isinstance(number, float) for number in (start, stop, step)) else tf.int64
    with _on(device):
        if (stop - start) * step <= 0:  # nothing, where tf.range would refuse
            return tf.zeros((0,), dtype)
        return tf.range(start, stop, step, dtype)


def eye(n_rows: int, n_cols: int | None = None, /, *, k: int = 0, dtype: Any = None, device: Any = None) -> Any:
    """Return ones on the k-th diagonal and zeros elsewhere."""
    with _on(device):
        rows, columns = tf.range(n_rows), tf.range(n_rows if n_cols is None else n_cols)
        return tf.cast(rows[:, None] + k == columns[None, :], dtype or tf.float32)
