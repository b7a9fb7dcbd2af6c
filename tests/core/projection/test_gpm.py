from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import GPM
from reference.formulas import gpm_basis
from tests.backends import to_numpy, to_xp

Array = NDArray[np.float64]
WIDTH = 8


@st.composite
def representations(draw: st.DrawFn) -> list[Array]:
    """Two or three tasks' layer inputs as columns [d_in, n], of falling energy along random directions."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    decay = 2.0 ** -(np.arange(WIDTH)[:, None] ** draw(st.sampled_from([0.5, 1.0])))
    columns = st.integers(1, 20)
    return [
        np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0] @ (decay * random.normal(size=(WIDTH, draw(columns))))
        for _ in range(draw(st.integers(2, 3)))
    ]


EPSILONS = st.sampled_from([0.5, 0.9, 0.97, 0.999])


def remember(xp: Any, memory: GPM, representation: Array, name: str = "fc.weight") -> GPM:
    return memory.remember({name: to_xp(xp, representation @ representation.T)})


def largest_angle(first: Array, second: Array) -> float:
    """The sine of the largest principal angle between the spans of two orthonormal bases."""
    return float(np.linalg.norm(first - second @ (second.T @ first), ord=2)) if first.shape[1] else 0.0


@given(tasks=representations(), epsilon=EPSILONS)
def test_the_memory_is_that_of_the_published_svd(xp: Any, tasks: list[Array], epsilon: float) -> None:
    memory, basis = GPM(epsilon, increment=0.0002), None
    for index, representation in enumerate(tasks):
        memory = remember(xp, memory, representation)
        basis = gpm_basis(basis, representation, epsilon + 0.0002 * index)
        kept = to_numpy(memory.bases["fc.weight"])
        assert kept.shape == basis.shape
        assert largest_angle(kept, basis) < 1e-6  # a hundredth of a degree is 1.7e-4


@given(tasks=representations(), epsilon=EPSILONS)
def test_it_holds_the_share_asked_for_with_the_fewest_directions(xp: Any, tasks: list[Array], epsilon: float) -> None:
    first = tasks[0]
    basis = to_numpy(remember(xp, GPM(epsilon), first).bases["fc.weight"])
    held = [float(np.sum((basis[:, :k].T @ first) ** 2) / np.sum(first**2)) for k in range(basis.shape[1] + 1)]
    assert held[-1] >= epsilon - 1e-12
    assert held[-2] < epsilon


@given(tasks=representations(), epsilon=EPSILONS)
def test_the_basis_is_orthonormal_and_grows(xp: Any, tasks: list[Array], epsilon: float) -> None:
    memory = GPM(epsilon)
    for index, representation in enumerate(tasks):
        before = memory
        memory = remember(xp, memory, representation)
        basis = to_numpy(memory.bases["fc.weight"])
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
        assert memory.tasks == index + 1
        assert memory.ranks["fc.weight"] == (basis.shape[1], WIDTH)
        assert basis.shape[1] <= WIDTH
        if before.bases:  # old directions stay as they are
            old = to_numpy(before.bases["fc.weight"])
            np.testing.assert_array_equal(basis[:, : old.shape[1]], old)


@given(tasks=representations(), epsilon=EPSILONS)
def test_projected_updates_leave_the_old_outputs(xp: Any, tasks: list[Array], epsilon: float) -> None:
    memory = remember(xp, remember(xp, GPM(epsilon), tasks[0]), tasks[1])
    basis = to_numpy(memory.bases["fc.weight"])
    update = np.arange(5 * WIDTH, dtype=np.float64).reshape(5, 2, 2, WIDTH // 4)  # a convolution's shape
    once = memory.project({"fc.weight": to_xp(xp, update)})
    projected = to_numpy(once["fc.weight"])
    assert projected.shape == update.shape
    np.testing.assert_allclose(projected.reshape(5, -1) @ basis, 0, atol=1e-12)
    np.testing.assert_allclose(to_numpy(memory.project(once)["fc.weight"]), projected, atol=1e-12)
    difference = (update - projected).reshape(5, -1)
    np.testing.assert_allclose(difference, difference @ basis @ basis.T, atol=1e-12)  # and only that was taken


@given(tasks=representations())
def test_projecting_the_inputs_projects_the_gradient(xp: Any, tasks: list[Array]) -> None:
    memory = remember(xp, GPM(0.9), tasks[0])
    a, g = np.arange(3.0 * WIDTH).reshape(3, WIDTH), np.arange(6.0).reshape(3, 2)
    rows = to_numpy(memory.project_rows("fc.weight", to_xp(xp, a)))
    whole = to_numpy(memory.project({"fc.weight": to_xp(xp, g.T @ a)})["fc.weight"])
    np.testing.assert_allclose(g.T @ rows, whole, atol=1e-11)


def test_what_it_does_not_know_is_unchanged(xp: Any) -> None:
    memory = remember(xp, GPM(0.9), np.eye(WIDTH))
    update = xp.ones((3,))
    assert memory.project({"heads.0.weight": update})["heads.0.weight"] is update
    assert memory.project_rows("other.weight", update) is update
    assert GPM(0.9).project({"fc.weight": update})["fc.weight"] is update


def test_a_task_that_the_memory_holds_already_adds_nothing(xp: Any) -> None:
    representation = np.diag([4.0, 2.0, 1.0, 0.0])
    memory = remember(xp, GPM(0.9), representation)
    assert memory.ranks == {"fc.weight": (2, 4)}  # 20 of 21, and 16 of 21 would not do
    assert remember(xp, memory, representation).ranks == {"fc.weight": (2, 4)}


def test_the_threshold_grows_by_the_increment_and_ends_at_one(xp: Any) -> None:
    memory = GPM(0.7, increment=0.2)
    representation = np.diag([4.0, 2.0, 1.0])  # energies 16, 4, 1 of 21: shares 0.76, 0.95, 1
    ranks = []
    for _ in range(3):
        memory = remember(xp, memory, representation)
        ranks.append(memory.ranks["fc.weight"][0])
    assert ranks == [1, 2, 3]  # at 0.7, 0.9 and 1
    assert remember(xp, memory, representation).ranks == {"fc.weight": (3, 3)}


def test_a_saturated_memory_stops_every_update(xp: Any) -> None:
    memory = remember(xp, GPM(1.0), np.eye(4))
    assert memory.ranks == {"fc.weight": (4, 4)}
    np.testing.assert_allclose(
        to_numpy(memory.project({"fc.weight": xp.ones((2, 4), dtype=xp.float64)})["fc.weight"]), 0, atol=1e-15
    )
    assert remember(xp, memory, np.ones((4, 3))).ranks == {"fc.weight": (4, 4)}


def test_a_layer_that_saw_nothing_keeps_nothing(xp: Any) -> None:
    assert remember(xp, GPM(0.9), np.zeros((4, 5))).ranks == {"fc.weight": (0, 4)}


def test_a_layer_may_join_later(xp: Any) -> None:
    memory = remember(xp, remember(xp, GPM(0.9), np.eye(4)), np.eye(3), name="new.weight")
    assert memory.ranks == {"fc.weight": (4, 4), "new.weight": (3, 3)}


def test_a_float32_memory_stays_float32(xp: Any) -> None:
    memory = GPM(0.9).remember({"fc.weight": xp.eye(3, dtype=xp.float32)})
    assert memory.bases["fc.weight"].dtype == xp.float32


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(BecameError, match=r"^the GPM threshold is .*; it must be above 0 and at most 1\.$"):
        GPM(threshold)


def test_a_gram_matrix_that_does_not_fit_is_refused(xp: Any) -> None:
    with pytest.raises(BecameError, match=r"^the Gram matrix of 'w' has shape \(3, 4\); it must be square\.$"):
        GPM(0.9).remember({"w": xp.ones((3, 4))})
    memory = GPM(0.9).remember({"w": xp.eye(3)})
    with pytest.raises(BecameError, match=r"^the Gram matrix of 'w' has shape \(4, 4\); it must be \[3, 3\]\.$"):
        memory.remember({"w": xp.eye(4)})


def test_updates_keep_their_dtype_beside_a_memory_of_another(xp: Any) -> None:
    memory = GPM(0.9).remember({"fc.weight": xp.eye(3, dtype=xp.float64)})
    assert memory.project({"fc.weight": xp.ones((2, 3), dtype=xp.float32)})["fc.weight"].dtype == xp.float32
