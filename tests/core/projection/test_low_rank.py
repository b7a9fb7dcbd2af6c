"""Low-rank adapters: effective weights and gradients of the formula, bounds of curvature, and rows off old inputs."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import GPM, NSCL, LowRankRegion
from reference.projection import low_rank_gradients
from tests.backends import to_numpy, to_xp
from tests.projections import WIDTH, Started, finished

SHAPES = {"fc.weight": (5, WIDTH), "conv.weight": (3, WIDTH // 4, 2, 2)}
SCALE = 0.5


def factors(rank: int = 2) -> dict[str, NDArray[np.float64]]:
    draw = np.random.default_rng(0)
    down = {f"{name}@A": draw.normal(size=(rank, WIDTH)) for name in SHAPES}
    return down | {f"{name}@B": draw.normal(size=(shape[0], rank)) for name, shape in SHAPES.items()}


def arrays(seed: int = 1) -> dict[str, NDArray[np.float64]]:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape) for name, shape in SHAPES.items()}


def test_effective_weights_and_gradients_are_those_of_the_formula(xp: Any) -> None:
    own, theta, gradients = factors(), arrays(), arrays(2)
    region = LowRankRegion(to_xp(xp, own), scale=SCALE)
    assert region.weights == frozenset(SHAPES)
    effective = region.effective(to_xp(xp, theta))
    other = xp.ones((2,))
    pulled = region.pull_back({**to_xp(xp, gradients), "fc.bias": other}, to_xp(xp, theta))
    assert pulled.pop("fc.bias") is other
    assert pulled.keys() == own.keys()  # none by a weight: it stands still
    for name, shape in SHAPES.items():
        a, b = own[f"{name}@A"], own[f"{name}@B"]
        expected = theta[name] + SCALE * (b @ a).reshape(shape)
        np.testing.assert_allclose(to_numpy(effective[name]), expected, atol=1e-12)
        by_a, by_b = low_rank_gradients(gradients[name].reshape(shape[0], -1), a, b, SCALE)
        np.testing.assert_allclose(to_numpy(pulled[f"{name}@A"]), by_a, atol=1e-12)
        np.testing.assert_allclose(to_numpy(pulled[f"{name}@B"]), by_b, atol=1e-12)


def test_rows_that_are_fixed_have_no_gradient(xp: Any) -> None:
    own, theta = to_xp(xp, factors()), to_xp(xp, arrays())
    rows = {name: own[f"{name}@A"] for name in SHAPES}
    region = LowRankRegion.initial(rows, theta, scale=SCALE, trains_rows=False)
    ups = {f"{name}@B" for name in SHAPES}
    assert region.scales.keys() == ups
    assert not region.projected_as
    assert region.pull_back(to_xp(xp, arrays(2)), theta).keys() == ups
    assert region.curvature_bounds({name: value * value for name, value in theta.items()}).keys() == ups
    for name, value in region.effective(theta).items():  # B begins as 0
        np.testing.assert_array_equal(to_numpy(value), to_numpy(theta[name]))


def test_the_bounds_of_curvature_are_above_it(xp: Any) -> None:
    """For each row of B and each column of A, the diagonal of bounds minus the exact Hessian has no negative value."""
    own, curvature = factors(3), {name: value**2 for name, value in arrays().items()}
    bounds = LowRankRegion(to_xp(xp, own), scale=SCALE).curvature_bounds(to_xp(xp, curvature))
    for name, shape in SHAPES.items():
        s, a, b = curvature[name].reshape(shape[0], -1), own[f"{name}@A"], own[f"{name}@B"]
        by_a, by_b = (to_numpy(bounds[f"{name}@{part}"]) for part in "AB")
        for row in range(shape[0]):
            slack = np.diag(by_b[row]) - SCALE**2 * a @ np.diag(s[row]) @ a.T
            assert np.linalg.eigvalsh(slack)[0] > -1e-9
        for column in range(WIDTH):
            slack = np.diag(by_a[:, column]) - SCALE**2 * b.T @ np.diag(s[:, column]) @ b
            assert np.linalg.eigvalsh(slack)[0] > -1e-9


@pytest.mark.parametrize("projector", [GPM(1.0), NSCL()], ids=["GPM", "NSCL"])
def test_rows_begin_off_old_inputs_and_as_long_as_they_were_drawn(xp: Any, projector: GPM | NSCL) -> None:
    inputs = np.random.default_rng(0).normal(size=(WIDTH, 3))  # three of the directions
    memory, drawn = projector.remember(finished(xp, inputs)), to_xp(xp, {"fc.weight": factors()["fc.weight@A"]})
    rows = to_numpy(memory.adapter_rows(Started(1, {}), drawn)["fc.weight"])
    np.testing.assert_allclose(rows @ inputs, 0, atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.linalg.norm(factors()["fc.weight@A"], axis=1))
    np.testing.assert_array_equal(
        to_numpy(projector.adapter_rows(Started(0, {}), drawn)["fc.weight"]), factors()["fc.weight@A"]
    )


def test_rows_are_zero_where_no_direction_is_left(xp: Any) -> None:
    memory = GPM(1.0).remember(finished(xp, np.eye(WIDTH)))
    drawn = to_xp(xp, {"fc.weight": factors()["fc.weight@A"]})
    rows = to_numpy(memory.adapter_rows(Started(1, {}), drawn)["fc.weight"])
    np.testing.assert_array_equal(rows, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fc.weight@A": None}, "without its other factor"),
        ({"fc.weight@B": None}, "without its other factor"),
        ({"fc.weight@C": np.ones((1, 1))}, "without its other factor"),
        ({"fc.weight@A": np.ones((3, WIDTH))}, "A of 'fc.weight' has rank 3, and B has 2"),
    ],
)
def test_factors_must_belong_together(changed: dict[str, Any], message: str) -> None:
    scales = {key: value for key, value in {**factors(), **changed}.items() if value is not None}
    with pytest.raises(BecameError, match=message):
        LowRankRegion(scales)
