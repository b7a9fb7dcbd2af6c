"""The Array API on TensorFlow, function by function, against NumPy: values, dtypes and shapes.

Each case is one expression in ``xp``, evaluated with both namespaces; on TensorFlow eagerly and, where shapes allow,
compiled by XLA.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from became_core.arrays import eigh, namespace

np: Any = importlib.import_module("array_api_compat.numpy")

tf: Any = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
xp: Any = importlib.import_module("became_core.arrays.tensorflow")

DRAW = numpy.random.default_rng(0)
A = DRAW.normal(size=(3, 4))
B = DRAW.normal(size=(4, 2))
S = DRAW.normal(size=(2, 3, 3))
SYMMETRIC = S @ S.swapaxes(-1, -2) + numpy.eye(3)
I = numpy.asarray([[3, 0, -2], [1, 0, 5]])  # noqa: E741
T = numpy.asarray([[True, False, False], [True, True, False]])
SPECIAL = numpy.asarray([0.0, -1.0, numpy.nan, numpy.inf, 2.5, -numpy.inf])
SINGLE = A.astype(numpy.float32)

CASES: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (lambda xp, a: (xp.exp(a), xp.tanh(a), xp.log(xp.square(a)), xp.log1p(xp.square(a)), xp.sqrt(xp.abs(a))), (A,)),
    (lambda xp, a: (xp.cos(a), xp.acos(xp.tanh(a))), (A,)),
    (lambda xp, i: (xp.abs(i), xp.square(i)), (I,)),
    (lambda xp, s: xp.isfinite(s), (SPECIAL,)),
    (lambda xp, t: (xp.logical_not(t), xp.logical_and(t, t[0, :])), (T,)),
    (lambda xp, s: (xp.clip(s, 0.0, 1.0), xp.clip(s, min=0), xp.clip(s, max=1), xp.clip(s)), (SPECIAL,)),
    (lambda xp, a: xp.clip(a, -0.1, 0.1), (SINGLE,)),
    (lambda xp, a, b: xp.clip(a, xp.min(b), xp.max(b)), (A, 0.1 * B)),
    (lambda xp, t, a, b: xp.where(t, a, b), (T, A[:2, :3], SINGLE[0, :3])),
    (lambda xp, t, a: (xp.where(t, a, 0.1), xp.where(t, 1, a)), (T, A[:2, :3].astype(numpy.float32))),
    (lambda xp, a: (xp.sum(a), xp.sum(a, axis=1), xp.sum(a, axis=(0, 1)), xp.sum(a, axis=-1, keepdims=True)), (A,)),
    (lambda xp, i, t: (xp.sum(i), xp.sum(t, axis=0)), (I.astype(numpy.int32), T)),
    (lambda xp, a: xp.mean(a), (A,)),
    (lambda xp, a: (xp.max(a), xp.max(a, axis=0), xp.min(a), xp.min(a, axis=-1, keepdims=True)), (A,)),
    (lambda xp, t: (xp.all(t), xp.all(t, axis=0), xp.any(t), xp.any(t, axis=(0, 1))), (T,)),
    (lambda xp, i: (xp.all(i), xp.any(i, axis=0)), (I,)),
    (lambda xp, s: xp.all(s), (SPECIAL,)),
    (lambda xp, i: xp.count_nonzero(i), (I,)),
    (lambda xp, a: (xp.argmax(a, axis=0), xp.argmax(a, axis=-1)), (A,)),
    (lambda xp, i: xp.argmax(i % 2, axis=1), (I,)),  # the first of equal ones
    (lambda xp, a: (xp.cumulative_sum(a, axis=0), xp.cumulative_sum(a[0, :]), xp.cumulative_sum(a, axis=-1)), (A,)),
    (lambda xp, a: (xp.argsort(a), xp.argsort(a, axis=0), xp.argsort(a[0, :], descending=True)), (A,)),
    (lambda xp, i: (xp.argsort(i), xp.argsort(i % 2, descending=True)), (I,)),  # equal elements stay in order
    (lambda xp, a: (xp.argsort(a, axis=0, stable=True), xp.argsort(a, descending=True)), (B,)),
    (lambda xp, v, a: xp.searchsorted(v, a), (numpy.sort(A[0]), A)),
    (lambda xp, v, a: xp.searchsorted(v, a), (numpy.asarray([1, 1, 2]), I)),  # to the left of equal ones
    (lambda xp, a, i: (xp.take(a, i, axis=1), xp.take(a[0, :], i)), (A, numpy.asarray([3, 0, -1]))),
    (lambda xp, a, i: xp.take_along_axis(a, i, axis=-1), (A, numpy.asarray([[0], [3], [-1]]))),
    (lambda xp, a, i: xp.take_along_axis(a, i, axis=0), (A, numpy.asarray([[2, 1, 0, -3]]))),
    (lambda xp, a, i: xp.take_along_axis(a, i, axis=-1), (S, numpy.asarray([[[0, 2]]]))),  # other axes broadcast
    (lambda xp, a, b: (xp.concat([a, b]), xp.concat([a, b], axis=1)), (A, SINGLE)),
    (lambda xp, a, b: (xp.stack([a, b]), xp.stack((a, b), axis=-1)), (A, SINGLE)),
    (lambda xp, a: (xp.reshape(a, (2, -1)), xp.reshape(a, (-1,)), xp.reshape(a[0, 0], ())), (A,)),
    (lambda xp, a: (xp.expand_dims(a, axis=0), xp.expand_dims(a, axis=-1)), (A,)),
    (lambda xp, a: (xp.broadcast_to(a, (2, 3, 4)), xp.permute_dims(a, (1, 0)), xp.matrix_transpose(a)), (A,)),
    (lambda xp, s: (xp.permute_dims(s, (2, 0, 1)), xp.matrix_transpose(s)), (S,)),
    (lambda xp, a: (xp.flip(a), xp.flip(a, axis=1), xp.flip(a[0, 0])), (A,)),
    (
        lambda xp, a, b: (xp.matmul(a, b), xp.matmul(a[0, :], b), xp.matmul(a, b[:, 0]), xp.matmul(a[0, :], b[:, 1])),
        (A, B),
    ),
    (lambda xp, s, v: (xp.matmul(s, s), xp.matmul(s, v), xp.matmul(v, s)), (S, SINGLE[:, 0])),
    (lambda xp, i: xp.matmul(i, xp.matrix_transpose(i)), (I,)),
    (lambda xp, a: (xp.zeros_like(a), xp.ones_like(a), xp.full_like(a, 2), xp.ones_like(a, dtype=xp.int32)), (SINGLE,)),
    (lambda xp, a: (xp.astype(a, xp.float32), xp.astype(a, xp.int64), xp.astype(a, xp.bool)), (A,)),
    (lambda xp, s: (xp.linalg.trace(s), xp.linalg.diagonal(s), xp.linalg.diagonal(s[0, :2, :])), (S,)),
    (lambda xp, s: (xp.linalg.eigvalsh(s), xp.linalg.eigh(s)[0]), (SYMMETRIC,)),
    (lambda xp, a: xp.linalg.svd(a)[1], (A,)),
    (lambda xp, s: (xp.linalg.cholesky(s), xp.linalg.cholesky(s, upper=True), xp.linalg.inv(s)), (SYMMETRIC,)),
    (lambda xp, s, b, a: (xp.linalg.solve(s, b), xp.linalg.solve(s[0, ...], a)), (SYMMETRIC, S, A)),
    (lambda xp, s, v: xp.linalg.solve(s[0, ...], v), (SYMMETRIC, SINGLE[:, 0])),
    (lambda xp, a: xp.linalg.vector_norm(a), (A,)),
]


def arrays_of(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(arrays_of(found), arrays_of(expected), strict=True):
        assert ours.dtype.name == theirs.dtype.name
        assert tuple(ours.shape) == theirs.shape
        numpy.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6 if theirs.dtype.itemsize < 8 else 1e-12)


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_a_function_is_numpys(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    expected = function(np, *arguments)
    assert_same(function(xp, *map(tf.constant, arguments)), expected)
    assert_same(function(xp, *map(tf.Variable, arguments)), expected)


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_a_function_is_numpys_compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    compiled = tf.function(lambda *tensors: function(xp, *tensors), jit_compile=True)
    assert_same(compiled(*map(tf.constant, arguments)), function(np, *arguments))


@pytest.mark.parametrize(
    "create",
    [
        lambda xp: xp.zeros((2, 3), dtype=xp.float64),
        lambda xp: xp.ones(3, dtype=xp.int32),
        lambda xp: xp.full((2,), 0.1, dtype=xp.float64),
        lambda xp: xp.full((2,), True),
        lambda xp: xp.full((), 7),
        lambda xp: xp.eye(3, dtype=xp.float64),
        lambda xp: xp.arange(4),
        lambda xp: xp.arange(4, dtype=xp.float64),
        lambda xp: xp.asarray([1, 2]),
        lambda xp: xp.asarray([[True], [False]]),
        lambda xp: xp.asarray(0.1, dtype=xp.float64),
        lambda xp: xp.asarray(numpy.float64(0.1)),
        lambda xp: xp.asarray(numpy.arange(3), dtype=xp.float32),
        lambda xp: xp.asarray(xp.asarray([1.5], dtype=xp.float64), dtype=xp.int32),
    ],
)
def test_creation_is_numpys(create: Callable[[Any], Any]) -> None:
    assert_same(create(xp), create(np))


def test_default_floats_are_single() -> None:
    for made in (xp.zeros(2), xp.ones(2), xp.full(2, 0.5), xp.eye(2), xp.asarray([0.5])):
        assert made.dtype == xp.float32


def test_an_array_shares_no_memory_with_its_source() -> None:
    source = numpy.arange(1000.0)
    tensor = xp.asarray(source)
    source[:] = -1
    assert float(xp.sum(tensor)) == 499500
    variable = tf.Variable([1.0])
    kept = [xp.asarray(variable), xp.astype(variable, xp.float32), xp.clip(variable), xp.flip(variable)]
    variable.assign([2.0])
    assert [float(each[0]) for each in kept] == [1.0] * 4


DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "float32", "float64"]
KINDS = ["bool", "integral", "real floating"]


@pytest.mark.parametrize("name", DTYPES)
def test_kinds_of_dtypes_are_numpys(name: str) -> None:
    ours, theirs = getattr(xp, name), getattr(np, name)
    assert [xp.isdtype(ours, kind) for kind in KINDS] == [np.isdtype(theirs, kind) for kind in KINDS]
    assert xp.isdtype(ours, xp.float32) == (name == "float32")
    assert xp.isdtype(ours, ("integral", "bool")) == np.isdtype(theirs, ("integral", "bool"))


@pytest.mark.parametrize("first", [*DTYPES[1:]])
@pytest.mark.parametrize("second", [1, 1.5])
def test_python_numbers_are_weak(first: str, second: float) -> None:
    if second == 1.5 and "int" in first:
        pytest.skip("the standard leaves this open")
    assert xp.result_type(getattr(xp, first), second) == getattr(xp, first)
    assert xp.result_type(xp.ones((), dtype=getattr(xp, first)), second) == getattr(xp, first)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("int8", "int32"), "int32"),
        (("uint8", "int8"), "int16"),
        (("float32", "float64"), "float64"),
        (("float16", "float32"), "float32"),
        (("bfloat16", "float32"), "float32"),
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("bool", "bool"), "bool"),
        (("float32", "float32", "float64"), "float64"),
    ],
)
def test_result_type_is_the_standards(names: tuple[str, ...], expected: str) -> None:
    assert xp.result_type(*(getattr(xp, name) for name in names)) == getattr(xp, expected)


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_the_limits_of_an_integer_dtype_are_numpys(name: str) -> None:
    ours, theirs = xp.iinfo(getattr(xp, name)), np.iinfo(getattr(np, name))
    assert (ours.bits, ours.max, ours.min) == (theirs.bits, theirs.max, theirs.min)


@pytest.mark.parametrize(("name", "bits", "eps"), [("float16", 16, 2.0**-10), ("bfloat16", 16, 2.0**-7)])
def test_limits_of_half_precision(name: str, bits: int, eps: float) -> None:
    info = xp.finfo(getattr(xp, name))
    assert (info.bits, info.eps) == (bits, eps)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_limits_are_numpys(name: str) -> None:
    ours, theirs = xp.finfo(getattr(xp, name)), np.finfo(getattr(np, name))
    for limit in ("bits", "eps", "max", "min", "smallest_normal"):
        assert getattr(ours, limit) == getattr(theirs, limit)


@pytest.mark.parametrize("compiled", [False, True])
def test_decompositions_give_back_the_matrix(compiled: bool) -> None:
    def run(function: Callable[..., Any], array: Any) -> Any:
        return tf.function(function, jit_compile=True)(array) if compiled else function(array)

    a, s = tf.constant(A), tf.constant(SYMMETRIC)
    values, vectors = run(xp.linalg.eigh, s)
    numpy.testing.assert_allclose((vectors * values[:, None, :]) @ xp.matrix_transpose(vectors), SYMMETRIC, atol=1e-12)
    for mode, width in (("reduced", 3), ("complete", 4)):
        q, r = run(lambda x, mode=mode: xp.linalg.qr(x, mode=mode), xp.matrix_transpose(a))
        assert (tuple(q.shape), tuple(r.shape)) == ((4, width), (width, 3))
        numpy.testing.assert_allclose(q @ r, A.T, atol=1e-12)


def test_eigenvectors_keep_their_derivatives() -> None:
    """Eager ones may be NumPy's: gradients of what no sign changes are TensorFlow's, of the first and second order."""
    tf: Any = importlib.import_module("tensorflow")
    weights = tf.constant([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75], [1.0, 3.0, -2.0]], tf.float64)

    def derivatives(decompose: Callable[[Any], Any]) -> list[Any]:
        s = tf.Variable(tf.constant(SYMMETRIC, tf.float64))
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                values, vectors = decompose(tf.convert_to_tensor(s))
                value = tf.reduce_sum(tf.sin(values)[..., None, :] * tf.matmul(weights, vectors) ** 2)
            (first,) = inner.gradient(value, [s])
            total = tf.reduce_sum(first * weights)
        return [value, first, outer.gradient(total, s)]

    for ours, theirs in zip(derivatives(eigh), derivatives(tf.linalg.eigh), strict=True):
        numpy.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_every_kind_of_tensor_is_an_array_of_the_namespace() -> None:
    seen = []

    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def traced(x: Any) -> Any:
        seen.append(namespace(x=x))
        return x

    traced(tf.ones(2))
    seen.append(namespace(eager=tf.ones(2), variable=tf.Variable(1.0)))
    assert seen == [xp, xp]


def test_autograph_has_nothing_to_warn_of() -> None:
    """In a process of its own, for AutoGraph warns but once of what it cannot transform."""
    code = """
import tensorflow as tf
from became_core import merge, optimal_alpha
x = {"fc.weight": tf.ones((3, 2)), "fc.bias": tf.ones(2)}
y = tf.nest.map_structure(lambda leaf: 2 * leaf, x)
print(tf.function(lambda x, y: merge(x, y, optimal_alpha(x, y, y, x, gradient=x, per="layer")))(x, y))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=900)
    assert "AutoGraph" not in done.stderr
