"""InfLoRA against the published code's design of A, and its memory against both forms of DualGPM."""

from typing import Any

import numpy as np
from hypothesis import given
from numpy.typing import NDArray

from became_core.projection import InfLoRA
from reference.projection import dualgpm_complement, gpm_basis, inflora_rows, projection
from tests.backends import to_numpy, to_xp
from tests.projections import EPSILONS, WIDTH, Started, finished, representations

Array = NDArray[np.float64]
NOTHING = np.zeros((WIDTH, 0))


def gram(representation: Array) -> Array:
    return np.asarray(representation @ representation.T / representation.shape[1])


def rows_of(xp: Any, memory: InfLoRA, representation: Array, rank: int) -> Array:
    start = Started(1, {}, stored_grams=to_xp(xp, {"fc.weight": gram(representation)}))
    return to_numpy(memory.adapter_rows(start, {"fc.weight": xp.ones((rank, WIDTH), dtype=xp.float64)})["fc.weight"])


@given(tasks=representations(), epsilon=EPSILONS)
def test_the_memory_is_that_of_dualgpm_in_both_of_its_forms(xp: Any, tasks: list[Array], epsilon: float) -> None:
    memory, basis, free = InfLoRA(epsilon, increment=0.0), NOTHING, np.eye(WIDTH)
    for representation in tasks:
        memory = memory.remember(finished(xp, representation))
        basis = gpm_basis(basis, gram(representation), epsilon)
        free = dualgpm_complement(free, gram(representation), epsilon)
        ours = projection(to_numpy(memory.bases["fc.weight"]))
        np.testing.assert_allclose(ours, projection(basis), atol=1e-6)
        np.testing.assert_allclose(ours, free @ free.T, atol=1e-6)


def test_rows_are_those_of_the_published_code_up_to_their_signs(xp: Any) -> None:
    draw = np.random.default_rng(0)
    old, new = draw.normal(size=(WIDTH, 3)), draw.normal(size=(WIDTH, 20)) * np.arange(1, WIDTH + 1)[:, None]
    for memory, basis in ((InfLoRA(1.0), NOTHING), (InfLoRA(1.0).remember(finished(xp, old)), np.linalg.qr(old)[0])):
        rows, expected = rows_of(xp, memory, new, 4), inflora_rows(gram(new), basis, 4)
        np.testing.assert_allclose(np.abs(3 * rows @ expected.T), np.eye(4), atol=1e-9)
        np.testing.assert_allclose(rows @ basis, 0, atol=1e-12)


def test_directions_without_energy_are_no_rows_and_a_full_space_leaves_a_row_of_zeros(xp: Any) -> None:
    new = np.random.default_rng(0).normal(size=(WIDTH, 2))
    assert rows_of(xp, InfLoRA(), new, 4).shape == (2, WIDTH)
    full = InfLoRA(1.0).remember(finished(xp, np.eye(WIDTH)))
    np.testing.assert_array_equal(rows_of(xp, full, new, 4), np.zeros((1, WIDTH)))


def test_the_memory_grows_by_the_squares_of_eigenvalues(xp: Any) -> None:
    """Of eigenvalues 4 and 2, the first has 0.8 of the squares, and 0.67 of their sum, as GPM would have it."""
    inputs = np.sqrt(WIDTH) * np.diag(np.sqrt([4.0, 2.0, *np.zeros(WIDTH - 2)]))
    assert InfLoRA(0.75).remember(finished(xp, inputs)).rank == {"fc.weight": (1, WIDTH)}
    assert InfLoRA(0.85).remember(finished(xp, inputs)).rank == {"fc.weight": (2, WIDTH)}
