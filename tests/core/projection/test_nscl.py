"""NSCL against the eigenvectors of the summed covariances."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import NSCL
from reference.projection import nscl_null_space
from tests.backends import to_numpy, to_xp
from tests.projections import WIDTH, Finished, finished, representations

Array = NDArray[np.float64]


@given(
    tasks=representations(columns=(WIDTH + 2, 20)),
    ratio=st.sampled_from([1.0, 3.0, 10.0, 100.0]),
    normalised=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_updates_are_those_of_the_published_null_space(
    xp: Any, tasks: list[Array], ratio: float, normalised: bool, seed: int
) -> None:
    memory = NSCL(ratio, normalised=normalised)
    update = np.random.default_rng(seed).normal(size=(3, WIDTH))
    for index, representation in enumerate(tasks):
        memory = memory.remember(finished(xp, representation))
        null = nscl_null_space(tasks[: index + 1], ratio)
        covariance = sum(r @ r.T / r.shape[1] for r in tasks[: index + 1])
        values = np.linalg.eigvalsh(covariance)
        assume(values[0] > 1e-8 * values[-1])  # Otherwise rounding decides what is null.
        assert memory.rank == {"fc.weight": (WIDTH - null.shape[1], WIDTH)}
        expected = update @ null @ null.T / (np.linalg.norm(null @ null.T) if normalised else 1)
        projected = memory.project({"fc.weight": to_xp(xp, update)})["fc.weight"]
        np.testing.assert_allclose(to_numpy(projected), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(5))
def test_an_exact_null_space_is_found_whole(xp: Any, dtype: Any, seed: int) -> None:
    """Its eigenvalues are rounding, so their ratios can have any value."""
    draw = np.random.default_rng(seed)
    inputs = (draw.normal(size=(24, 5)) @ draw.normal(size=(5, 40))).astype(dtype)
    memory = NSCL().remember(finished(xp, inputs))
    assert memory.rank == {"fc.weight": (5, 24)}


def test_without_a_floor_the_smallest_eigenvalue_decides(xp: Any) -> None:
    """Of eigenvalues that are all rounding, the published rule keeps those near the smallest one, and the floor all."""
    inputs = np.diag([2.0, 1.5, 1e-9, 2e-11, 1e-11])  # the eigenvalues are a fifth of the squares
    published, floored = (NSCL(10.0, floored).remember(finished(xp, inputs)) for floored in (False, True))
    assert published.rank == {"fc.weight": (5 - nscl_null_space([inputs], 10.0).shape[1], 5)} == {"fc.weight": (3, 5)}
    assert floored.rank == {"fc.weight": (2, 5)}


def test_the_published_rule_compares_singular_values(xp: Any, backend: str) -> None:
    """Where there is an exact null space they are all rounding, which differs between libraries."""
    if backend not in ("numpy", "strict", "strictest"):
        pytest.skip("the rounding of this library is not NumPy's")
    inputs = np.random.default_rng(0).normal(size=(40, 20))
    memory = NSCL(10.0, floored=False).remember(finished(xp, inputs))
    free = nscl_null_space([inputs], 10.0).shape[1]
    assert memory.rank == {"fc.weight": (40 - free, 40)}
    assert free > 10


def test_at_least_one_direction_stays_free(xp: Any) -> None:
    memory = NSCL(1.0).remember(finished(xp, np.diag([4.0, 3.0, 2.0, 1.0])))
    assert memory.rank == {"fc.weight": (3, 4)}
    projected = memory.project({"fc.weight": to_xp(xp, np.ones((1, 4)))})["fc.weight"]
    np.testing.assert_allclose(to_numpy(projected), [[0, 0, 0, 1]], atol=1e-15)


def test_a_direction_is_null_if_its_eigenvalue_is_within_the_ratio(xp: Any) -> None:
    inputs = np.diag([4.0, 3.0, 2.0, 1.0])  # eigenvalues 16, 9, 4, 1, over 4
    ranks = [NSCL(ratio).remember(finished(xp, inputs)).rank["fc.weight"][0] for ratio in (1, 3.9, 4.1, 9.1, 17)]
    assert ranks == [3, 3, 2, 1, 0]


def test_bad_input_is_refused(xp: Any) -> None:
    for ratio in (0.5, float("nan")):
        with pytest.raises(BecameError, match=r"^the NSCL ratio is .*; it must be at least 1\.$"):
            NSCL(ratio)
    memory = NSCL().remember(Finished({"w": xp.eye(3)}, {}))
    with pytest.raises(BecameError, match=r"^the Gram matrix of 'w' has shape \(2, 2\); it must be \[3, 3\], or "):
        memory.remember(Finished({"w": xp.eye(2)}, {}))
    along_axes = NSCL().remember(Finished({"w": xp.asarray([1.0, 2.0, 3.0])}, {}))
    with pytest.raises(BecameError, match=r"^'w' has 1 rows; its memory is one of 3\.$"):
        along_axes.remember(Finished({"w": xp.asarray([1.0])}, {}))
    with pytest.raises(BecameError, match=r"^the inputs of 'w' are not finite; look for NaN in the network\.$"):
        NSCL().remember(Finished({"w": xp.asarray([float("nan"), 1.0])}, {}))
