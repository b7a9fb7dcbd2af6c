from typing import Any

import array_api_compat.numpy
import array_api_strict
import numpy as np
import pytest

from became_core import BecameError
from became_core.arrays import check_values, device, difference, namespace, promoted, reduction_dtype


def test_namespace_is_the_arrays_own(xp: Any) -> None:
    array = xp.ones((2,))
    found = namespace(first=array, second=xp.zeros(()))
    assert found.sum(array) == 2
    assert namespace(again=found.sum(array)) is found


def test_mixed_frameworks_name_both() -> None:
    with pytest.raises(
        BecameError, match=r"^a is an array of numpy but b is one of array_api_strict; give arrays of a"
    ):
        namespace(a=np.ones(2), b=array_api_strict.ones(2))


@pytest.mark.parametrize(("value", "kind"), [([1.0], "builtins.list"), (1.0, "builtins.float"), ("x", "builtins.str")])
def test_what_is_no_array_is_named(value: object, kind: str) -> None:
    with pytest.raises(BecameError, match=rf"^theta is a {kind}, not an array of a known framework\.$"):
        namespace(theta=value)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [(("float32",), "float32"), (("float64",), "float64"), (("float32", "float64"), "float64")],
)
def test_reduction_dtype_is_the_promoted_one(xp: Any, dtypes: tuple[str, ...], expected: str) -> None:
    arrays = {f"a{index}": xp.ones((), dtype=getattr(xp, name)) for index, name in enumerate(dtypes)}
    assert reduction_dtype(xp, **arrays) == getattr(xp, expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_reduces_in_single(xp: Any, name: str) -> None:
    if not hasattr(xp, name):
        pytest.skip(f"this backend has no {name}")
    assert reduction_dtype(xp, a=xp.ones((), dtype=getattr(xp, name))) == xp.float32


@pytest.mark.parametrize("name", ["int64", "bool", "complex64"])
def test_only_real_floats_are_reduced(xp: Any, name: str) -> None:
    with pytest.raises(BecameError, match=r"^mask has dtype .*; it must hold real floating-point numbers\.$"):
        reduction_dtype(xp, mask=xp.ones((2,), dtype=getattr(xp, name)))


def test_check_values_raises_only_when_false(xp: Any) -> None:
    check_values(xp.all(xp.ones((2,)) > 0), "never said")
    with pytest.raises(BecameError, match=r"^said$"):
        check_values(xp.all(xp.ones((2,)) < 0), "said")


def test_device_is_the_arrays_own(xp: Any) -> None:
    array = xp.ones((2,))
    assert device(array) == device(xp.zeros((1,), device=device(array)))


def test_numpy_scalars_are_arrays() -> None:
    assert namespace(scalar=np.float64(1.0), array=np.ones(2)) is array_api_compat.numpy


@pytest.mark.parametrize("pair", [("float16", "float32"), ("float16", "bfloat16"), ("float32", "float64")], ids=str)
def test_arrays_of_two_dtypes_are_promoted_and_those_of_one_stay(xp: Any, pair: tuple[str, str]) -> None:
    if not all(hasattr(xp, name) for name in pair):
        pytest.skip(f"this backend has not both {' and '.join(pair)}")
    left, right = (xp.ones((2,), dtype=getattr(xp, name)) for name in pair)
    expected = xp.float64 if "float64" in pair else xp.float32
    assert [array.dtype for array in promoted(left, right)] == [expected] * 2
    assert promoted(left, left)[0] is left
    assert difference({"w": left}, {"w": right})["w"].dtype == expected
    assert difference({"w": left}, {"w": left})["w"].dtype == left.dtype
