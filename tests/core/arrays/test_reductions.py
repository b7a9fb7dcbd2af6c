"""Sums of many numbers in single precision, against the exact sum; every element counted once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import optimal_alpha
from became_core.arrays import Workspace, inner_products, staged_sum
from became_core.arrays.frameworks import _ROWS
from became_core.arrays.namespace import loop_of, walk_of
from became_core.arrays.reductions import RUN
from tests.compilers import compiled

# The analysis for 10^9 elements, which do not fit a test. A number goes through log2(n) additions, each of which errs
# by u = 2^-24 = 6e-8 relative at most, by a third of it on average: 24 additions here, 30 for 10^9. Rounding to either
# side, they leave some 6e-8 * sqrt(30) / 2 = 1.6e-7; all to one side, as among equal numbers, 30 * 6e-8 / 3 = 6e-7.
# What holds here to 5e-7 holds there to 1e-6.
COUNT = 2**24


@pytest.mark.parametrize("values", ["constant", "uniform", "heavy"])
def test_a_sum_in_single_precision_is_right_to_1e_6(xp: Any, values: str) -> None:
    draw = np.random.default_rng(0)
    numbers = {
        "constant": np.full(COUNT, 0.1, dtype=np.float32),  # where adding one by one stands still
        "uniform": draw.random(COUNT, dtype=np.float32),
        "heavy": np.exp(4 * draw.standard_normal(COUNT, dtype=np.float32)),
    }[values]
    exact = math.fsum(numbers.astype(np.float64).reshape(-1, 4096).sum(axis=1))
    assert float(staged_sum(xp.asarray(numbers))) == pytest.approx(exact, rel=5e-7)


@pytest.mark.parametrize("value", [0.1, None])
def test_alpha_of_many_elements_in_single_precision(xp: Any, value: float | None) -> None:
    """Of equal numbers, whose roundings all go one way, and of different ones."""
    check_alpha(xp, optimal_alpha, value)


@given(size=st.integers(1, 400))
def test_a_staged_sum_takes_every_element_once(xp: Any, size: int) -> None:
    assert float(staged_sum(xp.asarray(2.0 ** (np.arange(size) % 40)))) == float(np.sum(2.0 ** (np.arange(size) % 40)))


SHAPES = [(), (0,), (3, 2), (2**18,), (2**18 + 1,), (3, 2**18), (130, 7), (2**21 + 2**17 + 3,)]


def both(left: Any, right: Any) -> Any:
    def factors(arithmetic: Any, piece: Sequence[Any]) -> list[tuple[Any, Any]]:
        difference = arithmetic.sub(piece[0], piece[1])
        return [(piece[0], piece[1]), (difference, arithmetic.mul(piece[0], piece[0]) * 0 + 1)]

    return inner_products(factors, [left, right])


@pytest.mark.parametrize("shape", [*SHAPES, (2**13 + 5,)])
def test_inner_products_take_every_element_once(xp: Any, shape: tuple[int, ...]) -> None:
    check_inner_products(xp, shape, both)


@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_inner_products_do_so_too(xp: Any, backend: str, shape: tuple[int, ...]) -> None:
    check_inner_products(xp, shape, compiled(backend, both))


def check_inner_products(xp: Any, shape: tuple[int, ...], function: Callable[[Any, Any], Any]) -> None:
    numbers = np.arange(math.prod(shape), dtype=float).reshape(shape)
    product, difference = function(xp.asarray(numbers), xp.asarray(-numbers))
    assert float(product) == -float(np.sum(numbers**2))
    assert float(difference) == 2 * float(np.sum(numbers))


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
    assert loop_of(xp.asarray(0.0)) is None
    check_inner_products(xp, (3, 2**18), compiled(backend, both))


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
    found = float(function(*(xp.asarray(each) for each in (gp, hat, old, new))))
    assert found == pytest.approx(top / (top + rest), rel=1e-6)


def test_products_are_added_in_turn_a_few_at_a_time(xp: Any) -> None:
    """As many slabs as are added in place, one more, and a shorter one, which is added to the first of its elements."""
    numbers = np.full(walk_of([xp.asarray(0.0)]).slab * (RUN + 1) + 3, 0.1, dtype=np.float32)
    (found,) = inner_products(lambda arithmetic, piece: [(piece[0], piece[0])], [xp.asarray(numbers)])
    assert float(found) == pytest.approx(len(numbers) * float(numbers[0]) ** 2, rel=5e-7)


def test_an_accelerators_own_sums_are_taken_of_whole_slabs(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, on whichever device this is: no rows, larger slabs, inner products where the framework has them."""
    rows = (replace(row, on_cpu=lambda array: False, fuses_inner_products=lambda array: True) for row in _ROWS)
    monkeypatch.setattr(import_module("became_core.arrays.frameworks"), "_ROWS", tuple(rows))
    monkeypatch.setattr(import_module("became_core.arrays.namespace"), "ACCELERATOR_SLAB", 2**12)
    for shape in SHAPES:
        if math.prod(shape) <= 2**18:  # more squares have a sum that is rounded, and so depends on the order
            check_inner_products(xp, shape, both)


def test_a_workspace_serves_leaves_of_every_kind(xp: Any) -> None:
    workspace = Workspace()
    for size, dtype in ((5, xp.float32), (2, xp.float32), (7, xp.float64), (9, xp.float32), (0, xp.float32)):
        array = xp.asarray(np.arange(size), dtype=dtype)
        found = inner_products(
            lambda arithmetic, piece: [
                (piece[0], arithmetic.mul(piece[0], piece[0])),
                (arithmetic.sub(*piece), piece[0]),
                (arithmetic.squared_difference(*piece), piece[0]),
            ],
            [array, -array],
            workspace,
        )
        assert all(each.dtype == dtype for each in found)
        cubes = sum(n**3 for n in range(size))
        assert [float(each) for each in found] == [cubes, 2 * sum(n**2 for n in range(size)), 4 * cubes]
