"""The linear algebra of the Array API on TensorFlow.

Convention: as the standard says; the last two axes are the matrices, decompositions return named tuples.
"""

from typing import Any, NamedTuple

from became_core.arrays.tensorflow.dtypes import promoted, tf
from became_core.arrays.tensorflow.reductions import sum

__all__ = [
    "cholesky",
    "diagonal",
    "eigh",
    "eigvalsh",
    "inv",
    "outer",
    "qr",
    "slogdet",
    "solve",
    "svd",
    "trace",
    "vector_norm",
]


class EighResult(NamedTuple):
    """Eigenvalues in ascending order [..., n], eigenvectors as columns [..., n, n]."""

    eigenvalues: Any
    eigenvectors: Any


class QRResult(NamedTuple):
    """Orthonormal columns Q and upper triangular R."""

    Q: Any
    R: Any


class SVDResult(NamedTuple):
    """x = U diag(S) Vh, S descending."""

    U: Any
    S: Any
    Vh: Any


class SlogdetResult(NamedTuple):
    """The determinant is sign * exp(logabsdet)."""

    sign: Any
    logabsdet: Any


def eigh(x: Any, /) -> EighResult:
    """Return the eigendecomposition of a symmetric (Hermitian) matrix."""
    return EighResult(*tf.linalg.eigh(x))


def eigvalsh(x: Any, /) -> Any:
    """Return the eigenvalues of a symmetric (Hermitian) matrix, ascending."""
    return tf.linalg.eigvalsh(x)


def qr(x: Any, /, *, mode: str = "reduced") -> QRResult:
    """Return the QR decomposition, "reduced" or "complete"."""
    return QRResult(*tf.linalg.qr(x, full_matrices=mode == "complete"))


def svd(x: Any, /, *, full_matrices: bool = True) -> SVDResult:
    """Return the singular value decomposition."""
    s, u, v = tf.linalg.svd(x, full_matrices=full_matrices)
    return SVDResult(u, s, tf.linalg.adjoint(v))


def slogdet(x: Any, /) -> SlogdetResult:
    """Return the sign and the logarithm of the absolute value of the determinant; XLA on the CPU has no such thing."""
    return SlogdetResult(*tf.linalg.slogdet(x))


def cholesky(x: Any, /, *, upper: bool = False) -> Any:
    """Return the lower (or upper) triangular Cholesky factor."""
    factor = tf.linalg.cholesky(x)
    return tf.linalg.adjoint(factor) if upper else factor


def solve(x1: Any, x2: Any, /) -> Any:
    """Return the solution of x1 @ x = x2; a one-dimensional x2 is a vector, anything else matrices."""
    x1, x2 = promoted(x1, x2)
    vector = len(x2.shape) == 1
    if vector:
        x2 = x2[:, None]
    # TensorFlow asks for equal batch axes, the standard for such as broadcast.
    batch = tf.broadcast_dynamic_shape(tf.shape(x1)[:-2], tf.shape(x2)[:-2])
    x1, x2 = (tf.broadcast_to(x, tf.concat([batch, tf.shape(x)[-2:]], axis=0)) for x in (x1, x2))
    solution = tf.linalg.solve(x1, x2)
    return solution[..., 0] if vector else solution


def inv(x: Any, /) -> Any:
    """Return the inverse."""
    return tf.linalg.inv(x)


def diagonal(x: Any, /, *, offset: int = 0) -> Any:
    """Return the diagonals of the last two axes."""
    return tf.linalg.diag_part(x, k=offset)


def trace(x: Any, /, *, offset: int = 0, dtype: Any = None) -> Any:
    """Return the sums along the diagonals of the last two axes; integers are summed in int64."""
    return sum(diagonal(x, offset=offset), axis=-1, dtype=dtype)


def outer(x1: Any, x2: Any, /) -> Any:
    """Return the outer product of two vectors."""
    x1, x2 = promoted(x1, x2)
    return x1[:, None] * x2[None, :]


def vector_norm(x: Any, /, *, axis: Any = None, keepdims: bool = False, ord: float = 2) -> Any:
    """Return the norm of vectors: along an axis, over several, or of all elements."""
    axis = list(axis) if isinstance(axis, tuple) else axis
    magnitude = tf.abs(x)
    if ord == float("inf"):
        return tf.reduce_max(magnitude, axis=axis, keepdims=keepdims)
    if ord == float("-inf"):
        return tf.reduce_min(magnitude, axis=axis, keepdims=keepdims)
    if ord == 0:
        return tf.reduce_sum(tf.cast(magnitude != 0, magnitude.dtype), axis=axis, keepdims=keepdims)
    if ord == 1:
        return tf.reduce_sum(magnitude, axis=axis, keepdims=keepdims)
    if ord == 2:
        return tf.sqrt(tf.reduce_sum(tf.square(magnitude), axis=axis, keepdims=keepdims))
    total = tf.reduce_sum(magnitude**ord, axis=axis, keepdims=keepdims)
    return total ** (1.0 / ord)
