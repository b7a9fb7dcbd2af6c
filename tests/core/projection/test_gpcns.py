"""GPCNS against the published algorithm: the SVDs of stacked gradients and of stacked bases."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import GPCNS, full
from reference.projection import gpcns_bases, gpcns_space, projection
from tests.backends import to_numpy, to_xp
from tests.projections import WIDTH, Finished, finished, representations

Array = NDArray[np.float64]


# Some singular values are exactly 1; with these thresholds no sum of them is equal to the wanted share.
@given(
    tasks=representations(columns=(WIDTH, 20)), epsilon=st.sampled_from([0.61, 0.83, 0.957]), scale=st.floats(0.5, 20)
)
def test_spaces_and_importances_are_the_published_ones(
    xp: Any, tasks: list[Array], epsilon: float, scale: float
) -> None:
    memory = GPCNS(epsilon, increment=0.0002, scale=scale)
    epsilons = [epsilon + 0.0002 * index for index in range(len(tasks))]
    for index, representation in enumerate(tasks):
        memory = memory.remember(finished(xp, representation))
        gradients = [task.T / np.sqrt(task.shape[1]) for task in tasks[: index + 1]]
        basis, importance = gpcns_space(gradients, epsilons[: index + 1], scale)
        space = memory.spaces["fc.weight"]
        np.testing.assert_allclose(to_numpy(space.importance), importance, atol=1e-6)
        sigma = np.linalg.svd(np.hstack(gpcns_bases(gradients, epsilons[: index + 1])), compute_uv=False)
        cut = len(importance)
        assume(
            index == 0 or cut in (0, len(sigma)) or sigma[cut - 1] - sigma[cut] > 1e-6
        )  # If they are equal, the basis is not unique.
        np.testing.assert_allclose(
            projection(to_numpy(space.basis), to_numpy(space.importance)), projection(basis, importance), atol=1e-6
        )


def test_the_first_task_is_protected_whole(xp: Any) -> None:
    """The singular values are 4, 3, 2, 1; their sums 4, 7 and 9 are at most 0.95 of 10."""
    gradients = np.diag([4.0, 3.0, 2.0, 1.0])
    memory = GPCNS(0.95, scale=0.1).remember(finished(xp, gradients))
    assert memory.rank == {"fc.weight": (3, 4)}
    update = {"fc.weight": to_xp(xp, np.ones((2, 4)))}
    once = memory.project(update)
    np.testing.assert_allclose(to_numpy(once["fc.weight"]), [[0, 0, 0, 1]] * 2, atol=1e-15)
    np.testing.assert_allclose(to_numpy(memory.project(once)["fc.weight"]), to_numpy(once["fc.weight"]), atol=1e-15)


def test_directions_that_tasks_share_have_the_largest_importance(xp: Any) -> None:
    """The bases {e1, e2} and {e1, e2, e3}, side by side, have the singular values sqrt 2, sqrt 2 and 1."""
    memory = GPCNS(1.0, scale=2.0).remember(finished(xp, np.diag([2.0, 1.0, 0.0, 0.0])))
    memory = memory.remember(finished(xp, np.diag([0.0, 0.0, 1.0, 0.0])))
    importance = to_numpy(memory.spaces["fc.weight"].importance)
    np.testing.assert_allclose(importance, [1, 1, 3 / (2 + np.sqrt(2))], atol=1e-12)
    assert memory.rank == {"fc.weight": (2, 4)}
    assert not full(memory)


def test_memory_does_not_grow_with_the_tasks(xp: Any) -> None:
    draw = np.random.default_rng(0)
    memory = GPCNS(0.97)
    sizes = []
    for _ in range(6):
        memory = memory.remember(finished(xp, draw.normal(size=(WIDTH, 20))))
        sizes.append(sum(to_numpy(array).size for array in memory.to_arrays().values()))
    assert max(sizes) <= 3 * WIDTH**2 + WIDTH + 1


def test_bad_input_is_refused(xp: Any) -> None:
    with pytest.raises(BecameError, match=r"^the GPCNS scale is 0; it must be above 0\.$"):
        GPCNS(0.9, scale=0)
    with pytest.raises(BecameError, match=r"^the GPCNS threshold is 0; it must be above 0 and at most 1\.$"):
        GPCNS(0)
    memory = GPCNS(0.9).remember(Finished({}, {"w": xp.eye(3)}))
    with pytest.raises(BecameError, match=r"^the Gram matrix of 'w' has shape \(4, 4\); it must be \[3, 3\], or "):
        memory.remember(Finished({}, {"w": xp.eye(4)}))
