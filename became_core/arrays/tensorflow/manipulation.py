"""Shapes, joining and selecting, and products of arrays."""

from typing import Any

from became_core.arrays.tensorflow.dtypes import promoted, tf

__all__ = [
    "broadcast_to",
    "concat",
    "expand_dims",
    "flip",
    "matmul",
    "matrix_transpose",
    "permute_dims",
    "reshape",
    "squeeze",
    "stack",
    "take",
    "take_along_axis",
    "tensordot",
    "vecdot",
]


def reshape(x: Any, /, shape: Any, *, copy: bool | None = None) -> Any:
    """Return the elements in another shape; one -1 is inferred."""
    return tf.reshape(x, shape)


def expand_dims(x: Any, /, *, axis: int) -> Any:
    """Return x with an axis of length 1 put in."""
    return tf.expand_dims(x, axis)


def squeeze(x: Any, /, axis: Any) -> Any:
    """Return x without axes of length 1: the one given, or the tuple."""
    return tf.squeeze(x, list(axis) if isinstance(axis, tuple) else axis)


def broadcast_to(x: Any, /, shape: Any) -> Any:
    """Return x repeated to a shape."""
    return tf.broadcast_to(x, shape)


def permute_dims(x: Any, /, axes: Any) -> Any:
    """Return x with its axes in another order."""
    return tf.transpose(x, axes)


def matrix_transpose(x: Any, /) -> Any:
    """Return x with its last two axes exchanged."""
    return tf.linalg.matrix_transpose(x)


def flip(x: Any, /, *, axis: Any = None) -> Any:
    """Return x reversed along an axis, several, or all."""
    axes = range(len(x.shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    return tf.reverse(x, list(axes)) if len(axes) else tf.convert_to_tensor(x)


def concat(arrays: Any, /, *, axis: int | None = 0) -> Any:
    """Return arrays joined along an axis; flattened first if it is None."""
    arrays = promoted(*arrays)
    return tf.concat([tf.reshape(x, [-1]) for x in arrays], 0) if axis is None else tf.concat(arrays, axis)


def stack(arrays: Any, /, *, axis: int = 0) -> Any:
    """Return arrays joined along a new axis."""
    return tf.stack(promoted(*arrays), axis)


def take(x: Any, indices: Any, /, *, axis: int | None = None) -> Any:
    """Return the slices at these indices, of which negative ones count from the end."""
    axis = 0 if axis is None else axis  # to be left out of a vector only
    return tf.gather(x, _from_start(indices, tf.shape(x)[axis]), axis=axis)


def take_along_axis(x: Any, indices: Any, /, *, axis: int = -1) -> Any:
    """Return the elements at these indices, an own index for each place; other axes are broadcast."""
    axis = axis % len(x.shape)
    indices = _from_start(indices, tf.shape(x)[axis])
    x, indices = _swapped(x, axis), _swapped(indices, axis)
    batch = tf.broadcast_dynamic_shape(tf.shape(x)[:-1], tf.shape(indices)[:-1])
    known = tf.broadcast_static_shape(x.shape[:-1], indices.shape[:-1]).concatenate(indices.shape[-1:])
    x, indices = (tf.broadcast_to(each, tf.concat([batch, tf.shape(each)[-1:]], 0)) for each in (x, indices))
    found = tf.gather(x, indices, batch_dims=len(x.shape) - 1, axis=-1)
    return _swapped(tf.ensure_shape(found, known), axis)  # what is known of the shape would else be lost


def _from_start(indices: Any, length: Any) -> Any:
    indices = tf.convert_to_tensor(indices)
    return tf.where(indices < 0, indices + tf.cast(length, indices.dtype), indices)


def _swapped(x: Any, axis: int) -> Any:
    """Return x with an axis and the last one exchanged."""
    axes = list(range(len(x.shape)))
    axes[axis], axes[-1] = axes[-1], axes[axis]
    return tf.transpose(x, axes)


def matmul(x1: Any, x2: Any, /) -> Any:
    """Return the matrix product; a vector is a row on the left and a column on the right."""
    x1, x2 = promoted(x1, x2)
    row, column = len(x1.shape) == 1, len(x2.shape) == 1
    product = tf.matmul(x1[None, :] if row else x1, x2[:, None] if column else x2)
    if column:
        product = product[..., 0]
    return product[..., 0] if row and column else product[..., 0, :] if row else product


def tensordot(x1: Any, x2: Any, /, *, axes: Any = 2) -> Any:
    """Return the sum of products over the last axes of x1 and the first of x2, or over the pairs of axes given."""
    return tf.tensordot(*promoted(x1, x2), axes)


def vecdot(x1: Any, x2: Any, /, *, axis: int = -1) -> Any:
    """Return the sum of products along an axis counted from the end, conjugating x1; other axes are broadcast."""
    x1, x2 = (_swapped(x, axis % len(x.shape)) for x in promoted(x1, x2))
    product = tf.einsum("...i,...i->...", tf.math.conj(x1), x2)
    axes = list(range(len(product.shape)))
    if axis < -1:  # the exchange left the former last axis where the summed one was
        axes.append(axes.pop(axis + 1))
    return tf.transpose(product, axes)
