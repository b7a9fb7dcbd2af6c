"""SGP against the published algorithm: the SVDs of the residual and of the inputs within the basis."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import GPM, SGP, full
from reference.projection import projection, sgp_space
from tests.backends import to_numpy, to_xp
from tests.projections import EPSILONS, WIDTH, finished, representations

Array = NDArray[np.float64]
SCALES = st.sampled_from([0.5, 5.0, 20.0])


@given(tasks=representations(), epsilon=EPSILONS, scale=SCALES)
def test_bases_and_importances_are_the_published_ones(
    xp: Any, tasks: list[Array], epsilon: float, scale: float
) -> None:
    memory, space = SGP(epsilon, increment=0.0002, scale=scale), None
    for index, representation in enumerate(tasks):
        memory = memory.remember(finished(xp, representation))
        space = sgp_space(space, representation, epsilon + 0.0002 * index, scale)
        subspace = memory.spaces["fc.weight"]
        np.testing.assert_allclose(to_numpy(subspace.importance), space[1], atol=1e-6)
        np.testing.assert_allclose(
            projection(to_numpy(subspace.basis), to_numpy(subspace.importance)), projection(*space), atol=1e-6
        )


@given(tasks=representations(), epsilon=EPSILONS, scale=SCALES, seed=st.integers(0, 1000))
def test_an_update_is_reduced_by_the_importance_of_each_direction(
    xp: Any, tasks: list[Array], epsilon: float, scale: float, seed: int
) -> None:
    memory = SGP(epsilon, scale=scale)
    for representation in tasks:
        memory = memory.remember(finished(xp, representation))
    basis, importance = to_numpy(memory.bases["fc.weight"]), to_numpy(memory.spaces["fc.weight"].importance)
    update = np.random.default_rng(seed).normal(size=(3, WIDTH))
    projected = to_numpy(memory.project({"fc.weight": to_xp(xp, update)})["fc.weight"])
    np.testing.assert_allclose(projected, update @ projection(basis, importance), atol=1e-12)
    np.testing.assert_allclose(projected @ basis, (update @ basis) * (1 - importance), atol=1e-12)
    assert np.all((importance >= 0) & (importance <= 1))


@given(tasks=representations(), epsilon=EPSILONS)
def test_the_bases_are_those_of_gpm_and_importances_never_fall(xp: Any, tasks: list[Array], epsilon: float) -> None:
    memory, gpm, before = SGP(epsilon), GPM(epsilon), np.zeros(0)
    for representation in tasks:
        memory, gpm = memory.remember(finished(xp, representation)), gpm.remember(finished(xp, representation))
        np.testing.assert_array_equal(to_numpy(memory.bases["fc.weight"]), to_numpy(gpm.bases["fc.weight"]))
        importance = to_numpy(memory.spaces["fc.weight"].importance)
        assert np.all(importance[: len(before)] >= before)
        before = importance


@pytest.mark.parametrize("rank", [3, 6, 8])
def test_sgp_with_all_importances_1_is_gpm(xp: Any, rank: int) -> None:
    """If all singular values are equal, each is the largest, and every importance is 1 at any scale."""
    inputs = np.eye(WIDTH)[:, :rank]
    memory, gpm = SGP(1.0, scale=0.1).remember(finished(xp, inputs)), GPM(1.0).remember(finished(xp, inputs))
    assert memory.rank == gpm.rank == {"fc.weight": (rank, WIDTH)}
    assert full(memory) == ({"fc.weight"} if rank == WIDTH else frozenset())
    update = {"fc.weight": to_xp(xp, np.random.default_rng(0).normal(size=(3, WIDTH)))}
    once = memory.project(update)
    for other in (gpm.project(update), memory.project(once)):
        np.testing.assert_allclose(to_numpy(other["fc.weight"]), to_numpy(once["fc.weight"]), atol=1e-15)


def test_a_space_that_is_full_of_small_importances_still_learns(xp: Any) -> None:
    memory = SGP(1.0, scale=1.0).remember(finished(xp, np.diag([8.0, 4.0, 2.0, 1.0])))
    importance = to_numpy(memory.spaces["fc.weight"].importance)
    np.testing.assert_allclose(importance, [1, 2 / 3, 2 / 5, 2 / 9], atol=1e-12)
    assert memory.rank == {"fc.weight": (2, 4)}  # 2.29 rounded down
    assert not full(memory)


def test_a_layer_with_zero_inputs_is_not_protected(xp: Any) -> None:
    memory = SGP(0.9).remember(finished(xp, np.zeros((4, 5))))
    assert memory.remember(finished(xp, np.zeros((4, 5)))).rank == {"fc.weight": (0, 4)}


def test_a_task_with_zero_inputs_does_not_change_importances(xp: Any) -> None:
    memory = SGP(1.0, scale=1.0).remember(finished(xp, np.diag([2.0, 1.0])))
    again = memory.remember(finished(xp, np.zeros((2, 3))))
    np.testing.assert_array_equal(
        to_numpy(again.spaces["fc.weight"].importance), to_numpy(memory.spaces["fc.weight"].importance)
    )


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_above_0_is_refused(scale: float) -> None:
    with pytest.raises(BecameError, match=r"^the SGP scale is .*; it must be above 0\.$"):
        SGP(0.9, scale=scale)


def test_a_threshold_outside_its_range_is_refused() -> None:
    with pytest.raises(BecameError, match=r"^the SGP threshold is 1\.5; it must be above 0 and at most 1\.$"):
        SGP(1.5)
