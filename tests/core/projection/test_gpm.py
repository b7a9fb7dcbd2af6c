"""GPM against the published algorithm: the SVD of the stacked inputs."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import GPM
from reference.projection import gpm_basis, projection
from tests.backends import to_numpy, to_xp
from tests.projections import EPSILONS, WIDTH, Finished, finished, largest_angle, representations

Array = NDArray[np.float64]


def remember(xp: Any, memory: GPM, representation: Array, name: str = "fc.weight") -> GPM:
    return memory.remember(Finished({name: to_xp(xp, representation @ representation.T)}, {}))


@given(tasks=representations(), epsilon=EPSILONS)
def test_the_basis_is_that_of_the_published_svd(xp: Any, tasks: list[Array], epsilon: float) -> None:
    memory, basis = GPM(epsilon, increment=0.0002), None
    for index, representation in enumerate(tasks):
        memory = memory.remember(finished(xp, representation))
        basis = gpm_basis(basis, representation, epsilon + 0.0002 * index)
        ours = to_numpy(memory.bases["fc.weight"])
        assert ours.shape == basis.shape
        assert largest_angle(ours, basis) < 1e-6  # a hundredth of a degree is 1.7e-4
        np.testing.assert_allclose(projection(ours), projection(basis), atol=1e-6)


@given(tasks=representations(), epsilon=EPSILONS)
def test_the_scale_of_the_gram_matrix_does_not_matter(xp: Any, tasks: list[Array], epsilon: float) -> None:
    mean, total = GPM(epsilon), GPM(epsilon)
    for representation in tasks:
        mean, total = mean.remember(finished(xp, representation)), remember(xp, total, 1e3 * representation)
    assert mean.rank == total.rank
    assert largest_angle(to_numpy(mean.bases["fc.weight"]), to_numpy(total.bases["fc.weight"])) < 1e-6


def test_a_threshold_of_1_remembers_no_direction_of_rounding(xp: Any) -> None:
    """Inputs of one and of three dimensions need four directions, whatever rounding leaves in the other four."""
    for seed in range(100):
        draw = np.random.default_rng(seed)
        memory = GPM(1.0)
        for rank in (1, 3):
            memory = remember(xp, memory, 1e3 * draw.normal(size=(8, rank)))
        assert memory.rank == {"fc.weight": (4, 8)}


@given(tasks=representations(), epsilon=EPSILONS)
def test_the_basis_has_the_fewest_directions_with_the_wanted_share_of_energy(
    xp: Any, tasks: list[Array], epsilon: float
) -> None:
    first = tasks[0]
    basis = to_numpy(remember(xp, GPM(epsilon), first).bases["fc.weight"])
    shares = [float(np.sum((basis[:, :k].T @ first) ** 2) / np.sum(first**2)) for k in range(basis.shape[1] + 1)]
    assert shares[-1] >= epsilon - 1e-12
    assert shares[-2] < epsilon


@given(tasks=representations(), epsilon=EPSILONS)
def test_the_basis_is_orthonormal_and_grows(xp: Any, tasks: list[Array], epsilon: float) -> None:
    memory = GPM(epsilon)
    for index, representation in enumerate(tasks):
        before = memory
        memory = remember(xp, memory, representation)
        basis = to_numpy(memory.bases["fc.weight"])
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
        assert memory.tasks == index + 1
        assert memory.rank["fc.weight"] == (basis.shape[1], WIDTH)
        if before.bases:  # Old directions do not change.
            old = to_numpy(before.bases["fc.weight"])
            np.testing.assert_array_equal(basis[:, : old.shape[1]], old)


def test_remembering_the_same_task_twice_adds_nothing(xp: Any) -> None:
    representation = np.diag([4.0, 2.0, 1.0, 0.0])
    memory = remember(xp, GPM(0.9), representation)
    assert memory.rank == {"fc.weight": (2, 4)}  # The energies 16 + 4 of 21 are enough; 16 of 21 is not.
    assert remember(xp, memory, representation).rank == {"fc.weight": (2, 4)}


def test_the_threshold_grows_by_the_increment_and_ends_at_one(xp: Any) -> None:
    memory = GPM(0.7, increment=0.2)
    representation = np.diag([4.0, 2.0, 1.0])  # energies 16, 4, 1 of 21: shares 0.76, 0.95, 1
    ranks = []
    for _ in range(3):
        memory = remember(xp, memory, representation)
        ranks.append(memory.rank["fc.weight"][0])
    assert ranks == [1, 2, 3]  # at 0.7, 0.9 and 1
    assert remember(xp, memory, representation).rank == {"fc.weight": (3, 3)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_threshold_of_1_adds_all_directions_but_those_of_rounding(xp: Any, dtype: Any) -> None:
    """40 inputs lie in 5 of 24 dimensions, so their Gram matrix has 19 eigenvalues that are only rounding."""
    draw = np.random.default_rng(0)
    inputs = (draw.normal(size=(24, 5)) @ draw.normal(size=(5, 40))).astype(dtype)
    memory = remember(xp, GPM(1.0), inputs)
    assert memory.rank == {"fc.weight": (5, 24)}
    assert remember(xp, memory, inputs).rank == {"fc.weight": (5, 24)}


def test_a_layer_with_zero_inputs_has_an_empty_basis(xp: Any) -> None:
    assert remember(xp, GPM(0.9), np.zeros((4, 5))).rank == {"fc.weight": (0, 4)}


def test_a_new_layer_can_be_added_by_a_later_task(xp: Any) -> None:
    memory = remember(xp, remember(xp, GPM(0.9), np.eye(4)), np.eye(3), name="new.weight")
    assert memory.rank == {"fc.weight": (4, 4), "new.weight": (3, 3)}


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(BecameError, match=r"^the GPM threshold is .*; it must be above 0 and at most 1\.$"):
        GPM(threshold)


def test_a_gram_matrix_that_does_not_fit_is_refused(xp: Any) -> None:
    def grams(value: Any) -> Finished:
        return Finished({"w": value}, {})

    with pytest.raises(
        BecameError,
        match=r"^the Gram matrix of 'w' has shape \(4, 3\); it must be square, or ",
    ):
        GPM(0.9).remember(grams(xp.ones((4, 3))))
    memory = GPM(0.9).remember(grams(xp.eye(3)))
    with pytest.raises(BecameError, match=r"^the Gram matrix of 'w' has shape \(4, 4\); it must be \[3, 3\], or "):
        memory.remember(grams(xp.eye(4)))
    with pytest.raises(BecameError, match=r"^the Gram matrix of 'w' is not finite; look for NaN in the network\.$"):
        memory.remember(grams(xp.eye(3) * float("nan")))


@given(tasks=representations(), epsilon=EPSILONS, updates=st.integers(0, 1000))
def test_a_factor_gives_the_same_memory_as_its_gram_matrix(
    xp: Any, tasks: list[Array], epsilon: float, updates: int
) -> None:
    from_factor = from_gram = GPM(epsilon, increment=0.0)
    for representation in tasks:
        few = representation[:, : WIDTH - 2]
        from_factor = from_factor.remember(Finished({"w": to_xp(xp, few.T / few.shape[1] ** 0.5)}, {}))
        from_gram = from_gram.remember(Finished({"w": to_xp(xp, few @ few.T / few.shape[1])}, {}))
    assert from_factor.rank == from_gram.rank
    update = {"w": to_xp(xp, np.random.default_rng(updates).normal(size=(3, WIDTH)))}
    np.testing.assert_allclose(
        to_numpy(from_factor.project(update)["w"]), to_numpy(from_gram.project(update)["w"]), atol=1e-5
    )
