"""Dask: alpha* and merge only add to the graph, and give NumPy's numbers once they are computed."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from became_core import merge, optimal_alpha
from tests.backends import to_numpy, to_xp

pytest.importorskip("dask.array", reason="Dask is not installed")
xp: Any = importlib.import_module("array_api_compat.dask.array")

DRAW = np.random.default_rng(0)
TREES = [{"w": DRAW.uniform(size=(6, 4)), "b": DRAW.uniform(size=4)} for _ in range(6)]
GP, HAT, OLD, NEW, GRADIENT, MEAN = TREES


@pytest.fixture
def lazy() -> Iterator[Callable[[], None]]:
    """Let nothing be computed until what is returned is called."""
    dask: Any = importlib.import_module("dask")
    allowed: list[bool] = []

    def scheduler(*arguments: Any, **keywords: Any) -> Any:
        assert allowed, "the graph was computed"
        return dask.get(*arguments, **keywords)

    with dask.config.set(scheduler=scheduler):
        yield lambda: allowed.append(True)


@pytest.mark.usefixtures("lazy")
def test_the_guard_sees_a_computation() -> None:
    with pytest.raises(AssertionError, match="the graph was computed"):
        float(xp.sum(to_xp(xp, np.ones(2))))


def test_alpha_stays_lazy_and_is_numpys(lazy: Callable[[], None]) -> None:
    gp, hat, old, new, gradient, mean = (to_xp(xp, tree) for tree in TREES)
    plain = optimal_alpha(gp, hat, old, new)
    full = optimal_alpha(gp, hat, old, new, gradient=gradient, mean=mean, clip=False)
    lazy()
    assert float(plain) == pytest.approx(float(optimal_alpha(GP, HAT, OLD, NEW)), rel=1e-13)
    expected = optimal_alpha(GP, HAT, OLD, NEW, gradient=GRADIENT, mean=MEAN, clip=False)
    assert float(full) == pytest.approx(float(expected), rel=1e-13)


def test_merge_stays_lazy_and_is_numpys(lazy: Callable[[], None]) -> None:
    gp, hat, old, new = (to_xp(xp, tree) for tree in TREES[:4])
    merged = merge(gp, hat, optimal_alpha(gp, hat, old, new))
    lazy()
    expected = merge(GP, HAT, optimal_alpha(GP, HAT, OLD, NEW))
    for name, value in expected.items():
        np.testing.assert_allclose(to_numpy(merged[name]), value, rtol=1e-13)


def test_a_bad_curvature_is_not_looked_for(lazy: Callable[[], None]) -> None:
    one = to_xp(xp, np.ones(2))
    alpha = optimal_alpha(one, 2 * one, -one, 2 * one)
    lazy()
    assert float(alpha) == 1.0
