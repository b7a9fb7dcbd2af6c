"""The projection of rows, in each of its three forms, against the matrix I - M diag(importance) M^T."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.projection import GPM, NSCL, SGP
from became_core.projection.subspace import Subspace, energies
from reference.projection import projection
from tests.backends import to_numpy, to_xp
from tests.projections import Finished
from tests.strategies import few_if_compiled


def orthonormal(draw: np.random.Generator, width: int, rank: int) -> Any:
    return np.linalg.qr(draw.normal(size=(width, width)))[0][:, :rank]


@given(
    sizes=few_if_compiled(st.tuples(st.integers(1, 9), st.integers(0, 9)), [(1, 1), (9, 0), (9, 2), (9, 7)]),
    scaled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_form_is_the_projection(xp: Any, sizes: tuple[int, int], scaled: bool, seed: int) -> None:
    width, rank = sizes[0], min(sizes)
    draw = np.random.default_rng(seed)
    basis, importance = orthonormal(draw, width, rank), draw.uniform(size=rank)
    space = Subspace.of(to_xp(xp, basis), to_xp(xp, importance) if scaled else None)
    rows = draw.normal(size=(4, width))
    expected = rows @ projection(basis, importance if scaled else None)
    np.testing.assert_allclose(to_numpy(space.project_rows("w", to_xp(xp, rows))), expected, atol=1e-13)
    assert space.protected == (int(importance.sum()) if scaled else rank)


@pytest.mark.parametrize("rank", [0, 2])
def test_directions_of_a_factor_are_orthonormal_down_to_the_floor(xp: Any, rank: int) -> None:
    draw, width, lengths = np.random.default_rng(0), 12, 10.0 ** -np.arange(6)
    factor = (orthonormal(draw, 6, 6) * lengths) @ orthonormal(draw, width, 6).T
    basis = orthonormal(draw, width, rank)
    parts = energies("w", to_xp(xp, factor), to_xp(xp, basis))
    count = int(np.sum(to_numpy(parts.new) > to_numpy(parts.floor)))
    assert count >= 5
    found = np.concatenate([basis, to_numpy(parts.directions)[:, :count]], axis=1)
    np.testing.assert_allclose(found.T @ found, np.eye(rank + count), atol=1e-14)


@pytest.mark.parametrize(
    ("rank", "importance", "form", "columns"),
    [
        (0, 1.0, "I - F F^T", 0),
        (3, 1.0, "I - F F^T", 3),
        (3, 0.5, "I - F F^T", 3),
        (4, 1.0, "F F^T", 2),
        (6, 1.0, "F F^T", 0),
        (4, 0.5, "F", 6),
    ],
)
def test_the_thinnest_form_is_taken(xp: Any, rank: int, importance: float, form: str, columns: int) -> None:
    space = Subspace.of(to_xp(xp, np.eye(6)[:, :rank]), to_xp(xp, np.full(rank, importance)))
    assert (space.form, tuple(space.factor.shape)) == (form, (6, columns))


def test_a_full_space_gives_exact_zeros(xp: Any) -> None:
    for dtype in (np.float32, np.float64):
        space = Subspace.of(to_xp(xp, orthonormal(np.random.default_rng(0), 5, 5).astype(dtype)))
        np.testing.assert_array_equal(to_numpy(space.project_rows("w", to_xp(xp, np.ones((2, 5), dtype)))), 0)


def test_a_space_with_an_importance_just_below_1_is_not_full(xp: Any) -> None:
    """A space is not full if the importance of one direction is one unit in the last place below 1."""
    importance = np.asarray([1, 1, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    assert Subspace.of(to_xp(xp, np.eye(3, dtype=np.float32)), to_xp(xp, importance)).protected == 2


@pytest.mark.parametrize("rank", [1, 40, 64, 65, 127])
@pytest.mark.parametrize("scaled", [False, True])
def test_float32_keeps_remembered_directions_to_1e_5(xp: Any, rank: int, scaled: bool) -> None:
    draw = np.random.default_rng(rank)
    basis = orthonormal(draw, 128, rank).astype(np.float32)
    importance = np.where(np.arange(rank) % 2, 0.5, 1.0).astype(np.float32) if scaled else np.ones(rank, np.float32)
    space = Subspace.of(to_xp(xp, basis), to_xp(xp, importance))
    update = draw.normal(size=(16, 128)).astype(np.float32)
    projected = to_numpy(space.project_rows("w", to_xp(xp, update)))
    assert projected.dtype == np.float32
    along = projected.astype(np.float64) @ basis[:, importance == 1]
    assert np.linalg.norm(along, axis=0).max() <= 1e-5 * np.linalg.norm(update)


def test_half_precision_rows_are_projected_in_float32(xp: Any) -> None:
    if not hasattr(xp, "float16"):
        pytest.skip("this backend has no half precision")
    basis = orthonormal(np.random.default_rng(0), 8, 3).astype(np.float32)
    rows = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float16)
    projected = to_numpy(Subspace.of(to_xp(xp, basis)).project_rows("w", to_xp(xp, rows)))
    assert projected.dtype == np.float16
    exact = rows.astype(np.float64) @ projection(basis.astype(np.float64))
    np.testing.assert_array_equal(projected, exact.astype(np.float32).astype(np.float16))


def test_rows_of_another_width_are_refused(xp: Any) -> None:
    with pytest.raises(BecameError, match=r"^rows of 'fc\.weight' have 4 entries; its protected space is one of 3\.$"):
        Subspace.of(xp.eye(3)[:, :1]).project_rows("fc.weight", xp.ones((2, 4)))


@pytest.mark.parametrize("kind", [GPM, SGP, NSCL])
def test_the_diagonal_of_a_gram_matrix_is_remembered_as_that_matrix(xp: Any, kind: Any) -> None:
    """Two tasks look up some rows of an embedding; a third is never looked up, and two rows are no multiples."""
    tasks = [np.array([7.0, 0.0, 100.0, 0.5, 30.0, 0.0]), np.array([0.0, 60.0, 1.0, 20.0, 3.0, 0.0])]
    along_axes, dense = kind(), kind()
    update = np.random.default_rng(0).normal(size=(4, 6))
    for counts in tasks:
        along_axes = along_axes.remember(Finished({"words.weight": to_xp(xp, counts)}, {}))
        dense = dense.remember(Finished({"words.weight": to_xp(xp, np.diag(counts))}, {}))
        along_axes = kind().with_arrays(along_axes.to_arrays())
        assert along_axes.rank == dense.rank
        found, expected = (
            to_numpy(m.project({"words.weight": to_xp(xp, update)})["words.weight"]) for m in (along_axes, dense)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        assert np.abs(found - update).max() > 0.1


def test_the_rows_of_another_embedding_are_refused(xp: Any) -> None:
    memory = GPM().remember(Finished({"words.weight": to_xp(xp, np.ones(3))}, {}))
    with pytest.raises(BecameError, match=r"'words\.weight' has 4 rows; its memory is one of 3"):
        memory.remember(Finished({"words.weight": to_xp(xp, np.ones(4))}, {}))
