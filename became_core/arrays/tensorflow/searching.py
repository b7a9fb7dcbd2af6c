"""Sorting and searching."""

from typing import Any

from became_core.arrays.tensorflow.dtypes import promoted, tf

__all__ = ["argsort", "searchsorted"]


def argsort(x: Any, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Any:
    """Return the indices that sort x along an axis, as int64; equal elements stay in their order."""
    direction = "DESCENDING" if descending else "ASCENDING"
    return tf.cast(tf.argsort(x, axis=axis, direction=direction, stable=stable), tf.int64)


def searchsorted(x1: Any, x2: Any, /, *, side: str = "left") -> Any:
    """Return where x2's elements would be put into x1, a sorted vector, as int64."""
    x1, x2 = promoted(x1, x2)
    places = tf.searchsorted(x1, tf.reshape(x2, [-1]), side=side, out_type=tf.int64)
    return tf.reshape(places, tf.shape(x2))
