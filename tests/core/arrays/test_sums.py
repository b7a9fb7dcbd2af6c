"""Sums of products: every element counted once, accurate in single precision, in few operations and little memory."""

import gc
import math
import platform
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import optimal_alpha
from became_core.arrays import SumsOfProducts, sums_of_products, tree_sum
from became_core.arrays.frameworks import _ROWS, framework_of
from became_core.arrays.sums import ADDED_SLABS, LARGEST_JOINED, LOOP_PIECES
from tests.backends import to_numpy
from tests.compilers import compiled
from tests.strategies import few_if_compiled

# The analysis for 10^9 elements, which do not fit a test. A number goes through log2(n) additions, each of which errs
# by u = 2^-24 = 6e-8 relative at most, by a third of it on average: 24 additions here, 30 for 10^9. Rounding to either
# side, they leave some 6e-8 * sqrt(30) / 2 = 1.6e-7; all to one side, as among equal numbers, 30 * 6e-8 / 3 = 6e-7.
# What holds here to 5e-7 holds there to 1e-6.
COUNT = 2**24


@pytest.mark.parametrize("values", ["constant", "uniform", "heavy"])
def test_a_sum_in_single_precision_is_right_to_1e_6(xp: Any, backend: str, values: str) -> None:
    draw = np.random.default_rng(0)
    numbers = {
        "constant": np.full(COUNT, 0.1, dtype=np.float32),  # where adding one by one stands still
        "uniform": draw.random(COUNT, dtype=np.float32),
        "heavy": np.exp(4 * draw.standard_normal(COUNT, dtype=np.float32)),
    }[values]
    exact = math.fsum(numbers.astype(np.float64).reshape(-1, 4096).sum(axis=1))
    assert float(tree_sum_on(backend)(xp.asarray(numbers))) == pytest.approx(exact, rel=5e-7)


def tree_sum_on(backend: str) -> Callable[[Any], Any]:
    """JAX compiles every operation on every shape by itself unless it may compile them together."""
    return compiled(backend, tree_sum) if backend == "jax" else tree_sum


@pytest.mark.parametrize("value", [0.1, None])
def test_alpha_of_many_elements_in_single_precision(xp: Any, value: float | None) -> None:
    """Of equal numbers, whose roundings all go one way, and of different ones."""
    check_alpha(xp, optimal_alpha, value)


@pytest.mark.parametrize("value", [0.1, None])
def test_a_compiled_alpha_in_single_precision(xp: Any, backend: str, value: float | None) -> None:
    """The compilers' own sums, too."""
    check_alpha(xp, compiled(backend, optimal_alpha), value)


def check_alpha(xp: Any, function: Callable[..., Any], value: float | None) -> None:
    draw = np.random.default_rng(1)
    gp, hat, old, new = (draw.random(COUNT // 2, dtype=np.float32) for _ in range(4))
    if value is not None:
        gp, hat, old = np.zeros_like(gp), np.full_like(hat, value), np.full_like(old, 3 * value)
        new = np.full_like(new, value)
    delta = (hat - gp).astype(np.float64)
    top, rest = np.sum(delta**2 * new), np.sum(delta**2 * old)
    alpha = float(function(*(xp.asarray(array) for array in (gp, hat, old, new))))
    assert alpha == pytest.approx(top / (top + rest), rel=1e-6)


@given(size=few_if_compiled(st.integers(1, 400), [1, 3, 256, 399]))
def test_a_tree_sum_takes_every_element_once(xp: Any, backend: str, size: int) -> None:
    numbers = 2.0 ** (np.arange(size) % 40)
    table = np.stack([numbers, -2 * numbers], axis=-1)
    expected = float(np.sum(numbers))
    totals = tree_sum_on(backend)(xp.asarray(table))
    assert (float(totals[0]), float(totals[1])) == (expected, -2 * expected)


def products(row: Sequence[Any], square: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    """Left times right, and the cubes of their difference, in which a buffer is used again too early would show."""
    left, right = row
    return [(left, right), (square(left - right), left - right)]


def sums_of(*groups: Sequence[Sequence[Any]]) -> SumsOfProducts:
    return sums_of_products(products, groups)


def numbers_of(xp: Any, shape: tuple[int, ...], dtype: Any = None) -> tuple[Any, Any]:
    """Two arrays of small integers, so that all sums are exact, also in single precision if they are short."""
    left = (np.arange(math.prod(shape), dtype=float) % 7).reshape(shape)
    return xp.asarray(left, dtype=dtype or xp.float64), xp.asarray(left % 3, dtype=dtype or xp.float64)


def expected_of(shape: tuple[int, ...]) -> list[float]:
    left = np.arange(math.prod(shape), dtype=float) % 7
    return [float(np.sum(left * (left % 3))), float(np.sum((left - left % 3) ** 3))]


SHAPES = [(), (0,), (3, 2), (2**16,), (2**16 + 1,), (3, 2**16), (130, 7), (LOOP_PIECES[0] + LOOP_PIECES[1] + 3,)]


@pytest.mark.parametrize("shape", [*SHAPES, (2**13 + 5,)])
def test_sums_take_every_element_once(xp: Any, shape: tuple[int, ...]) -> None:
    assert [float(total[0]) for total in sums_of([numbers_of(xp, shape)]).sums] == expected_of(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_sums_do_so_too(xp: Any, backend: str, shape: tuple[int, ...]) -> None:
    function = compiled(backend, lambda left, right: sums_of([(left, right)]).sums)
    assert [float(total[0]) for total in function(*numbers_of(xp, shape))] == expected_of(shape)


@given(data=st.data())
def test_rows_of_all_sizes_and_dtypes_are_summed_by_groups(xp: Any, data: st.DataObject) -> None:
    """Small rows are joined, which must mix neither groups, nor precisions, nor the elements of a row."""
    shapes = st.sampled_from([(), (0,), (2, 3), (5,), (70_000,)])
    dtypes = st.sampled_from(["float32", "float64"])
    groups = data.draw(st.lists(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=5), min_size=1, max_size=3))
    rows = [[numbers_of(xp, shape, getattr(xp, dtype)) for shape, dtype in group] for group in groups]
    sums = sums_of(*rows).sums
    for index, group in enumerate(groups):
        expected = np.sum([expected_of(shape) for shape, _ in group], axis=0)
        assert [float(total[index]) for total in sums] == expected.tolist()


def test_a_row_keeps_its_precision_beside_one_of_less(xp: Any) -> None:
    narrow, wide = xp.ones((2,), dtype=xp.float32), xp.full((3,), 0.1, dtype=xp.float64)
    product, _ = sums_of([(narrow, narrow), (wide, wide)]).sums
    assert float(product[0]) == pytest.approx(2 + 3 * 0.1**2, rel=1e-14)


def test_half_precision_is_summed_in_single(xp: Any) -> None:
    if not hasattr(xp, "float16"):
        pytest.skip("this backend has no half precision")
    left = xp.astype(xp.ones(70_000), xp.float16)
    product, _ = sums_of([(left, left)]).sums
    assert (product.dtype, float(product[0])) == (xp.float32, 70_000.0)


def test_the_least_element_of_the_arrays_to_check_is_found(xp: Any) -> None:
    rows = [numbers_of(xp, shape) for shape in ((3,), (0,), (200_000,))]
    rows.append((xp.asarray([5.0, 1.0]), xp.asarray([-2.0, 1.0])))
    least: list[Any] = [
        sums_of_products(products, groups, to_check).least
        for groups, to_check in (([rows], [0]), ([rows[:1], rows], [0, 1]))
    ]
    assert [float(value) for value in least] == [0, -2]
    assert sums_of(rows).least is None


def test_where_the_compiler_fuses_sums_there_is_no_loop(xp: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As XLA does for a GPU, where each of a loop's many turns would be launches of their own."""
    if backend == "jax":
        import jax

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elif backend == "tensorflow":
        import tensorflow

        monkeypatch.setattr(tensorflow.config, "list_physical_devices", lambda kind: [f"a {kind}"])
    else:
        pytest.skip("this backend has no loop")
    framework, module = framework_of(xp.asarray(0.0))  # type: ignore[misc] # it is an array
    assert framework.loop(module) is None


def test_an_accelerator_sums_larger_slabs(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, on whichever device this is."""
    rows = tuple(replace(row, on_cpu=lambda array: False) for row in _ROWS)
    monkeypatch.setattr(import_module("became_core.arrays.frameworks"), "_ROWS", rows)
    monkeypatch.setattr(import_module("became_core.arrays.sums"), "ACCELERATOR_SLAB", 2**12)
    for shape in SHAPES:
        assert [float(total[0]) for total in sums_of([numbers_of(xp, shape)]).sums] == expected_of(shape)


@pytest.mark.parametrize("count", [1, ADDED_SLABS, ADDED_SLABS + 1, 2 * ADDED_SLABS + 3])
def test_rows_of_one_length_are_added_within_their_group_and_stay_as_they_were(xp: Any, count: int) -> None:
    """Some frameworks add the products of such rows before they sum them, which must mix neither groups nor dtypes."""
    shape, other = (LARGEST_JOINED + 1,), (LARGEST_JOINED + 2,)
    row, narrow = numbers_of(xp, shape), numbers_of(xp, shape, xp.float32)
    sums = sums_of([row] * count, [numbers_of(xp, other), *[row] * count], [narrow, row, narrow]).sums
    once, first = np.asarray(expected_of(shape)), np.asarray(expected_of(other))
    for group, expected in enumerate((count * once, first + count * once, 3 * once)):
        assert [float(total[group]) for total in sums] == expected.tolist()
    for array, expected in zip(row, numbers_of(np, shape), strict=True):
        np.testing.assert_array_equal(to_numpy(array), expected)


def test_rows_of_any_lengths_are_added_within_their_group(xp: Any) -> None:
    """A short one to the beginning of a long one, whichever comes first; also if many short ones were joined."""
    lengths = [LARGEST_JOINED + extra for extra in (5, 3, 9, 9, 1, 4, 12)] + [7, 5, LARGEST_JOINED + 3]
    rows = {length: numbers_of(xp, (length,)) for length in lengths}
    sums = sums_of([rows[length] for length in lengths], [rows[length] for length in reversed(lengths)]).sums
    expected = np.sum([expected_of((length,)) for length in lengths], axis=0)
    for group in range(2):
        assert [float(total[group]) for total in sums] == expected.tolist()


def test_derivatives_are_taken_through_the_sums(backend: str, xp: Any) -> None:
    """Over several slabs, backwards and forwards; and of one row alone, among others of its length or another."""
    if backend != "torch":
        pytest.skip("the other backends take derivatives under a trace, which test_tracing.py looks at")
    import torch

    forward_ad: Any = import_module("torch.autograd.forward_ad")
    left, right = (array.requires_grad_() for array in numbers_of(xp, (200_000,)))
    _, cubes = sums_of([(left, right)]).sums
    (gradient,) = torch.autograd.grad(cubes[0], left)
    assert torch.equal(gradient, 3 * (left - right).detach() ** 2)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(left.detach(), torch.ones_like(left))
        _, cubes = sums_of([(dual, right.detach())]).sums
        assert float(forward_ad.unpack_dual(cubes).tangent[0]) == float(torch.sum(gradient))
    for length in (200_000, 199_000, 201_000):
        others = numbers_of(xp, (length,))
        _, cubes = sums_of([others, (left, right), others]).sums
        assert torch.equal(torch.autograd.grad(cubes[0], left)[0], gradient)
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(left.detach(), torch.ones_like(left))
            _, cubes = sums_of([others, (dual, right.detach()), others]).sums
            assert float(forward_ad.unpack_dual(cubes).tangent[0]) == float(torch.sum(gradient))


# What an allocator keeps of memory depends on all that a process has done, so a new one is asked.
RESIDENT = """
import resource
import torch
from became_core import optimal_alpha

torch.set_num_threads(1)
models = [{f"{leaf}": torch.full((1000, 1250), 1.0 + number) for leaf in range(16)} for number in range(4)]
optimal_alpha(*[{"0": model["0"][:1]} for model in models])
used = [resource.getrusage(resource.RUSAGE_SELF)]
for _ in range(2):
    optimal_alpha(*models)
    used.append(resource.getrusage(resource.RUSAGE_SELF))
print((used[1].ru_maxrss - used[0].ru_maxrss) * 1024, used[2].ru_minflt - used[1].ru_minflt)
"""


def test_memory_is_that_of_a_few_slabs(backend: str) -> None:
    if backend == "torch" and sys.platform.startswith("linux"):
        done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, timeout=300)
        memory, new_pages = map(int, done.stdout.split())
        # It was 3.7 times a model in most processes while the sums of every slab were kept in arrays of their own.
        assert memory < 0.3 * 20_000_000 * 4
        # A second call uses the memory of the first: while glibc returned it to the system, these were 11,000 or more.
        assert platform.libc_ver()[0] != "glibc" or new_pages < 4_000
        return
    if backend != "numpy":
        pytest.skip("only NumPy tells Python of its memory; benchmarks/alpha.py measures the others")
    zeros, ones = np.zeros(20_000_000, dtype=np.float32), np.ones(20_000_000, dtype=np.float32)
    gc.collect()
    tracemalloc.start()
    optimal_alpha(zeros, ones, ones, ones)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.05 * ones.nbytes
