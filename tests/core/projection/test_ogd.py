"""OGD against the singular value decomposition of all gradients at once, and the bounds of its memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.arrays import Params
from became_core.projection import OGD
from reference.projection import ogd_directions
from tests.backends import to_numpy, to_xp
from tests.projections import Finished, finished
from tests.strategies import few_if_compiled

Array = NDArray[np.float64]
WIDTH = 24


def gradients(draw: np.random.Generator, samples: int, rank: int = WIDTH) -> Array:
    """Return gradients as rows [samples, WIDTH], in a random subspace, with falling energy along its directions."""
    span = np.linalg.qr(draw.normal(size=(WIDTH, WIDTH)))[0][:rank]
    return np.asarray(draw.normal(size=(samples, rank)) * 1.5 ** -np.arange(rank) @ span)


def directions(memory: OGD) -> Array:
    leaves = [to_numpy(memory.directions[name]) for name in ("fc.weight", "fc.bias")]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


@given(
    samples=few_if_compiled(st.lists(st.integers(1, 10), min_size=1, max_size=4), [[1], [10, 4, 10]]),
    capacity=few_if_compiled(st.integers(20, 40), [20, 40]),
    batch=few_if_compiled(st.integers(1, 6), [4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_directions_are_those_of_the_svd(xp: Any, samples: list[int], capacity: int, batch: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    memory, tasks = OGD(capacity=capacity), []
    for number in samples:
        tasks.append(gradients(draw, number))
        memory = memory.remember(finished(xp, tasks[-1].T, batch=batch))
        ours, theirs = directions(memory), ogd_directions(tasks, capacity)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.T @ ours, theirs.T @ theirs, atol=1e-6)
        np.testing.assert_allclose(ours @ ours.T, np.eye(len(ours)), atol=1e-12)


@given(batch=few_if_compiled(st.integers(1, 7), [1, 7]), seed=st.integers(0, 2**32 - 1))
def test_many_samples_of_few_directions_are_compressed_without_loss(xp: Any, batch: int, seed: int) -> None:
    """60 gradients lie in 5 dimensions and the capacity is 6, so rows are compressed many times without loss."""
    rows = gradients(np.random.default_rng(seed), 60, rank=5)
    memory = OGD(capacity=6).remember(finished(xp, rows.T, batch=batch))
    basis = directions(memory)
    assert memory.rank == {"shared parameters": (5, WIDTH)}
    np.testing.assert_allclose(rows @ basis.T @ basis, rows, atol=1e-12)


def test_memory_holds_at_most_twice_the_share_and_one_batch(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from became_core.projection import ogd

    counts = []
    joined = ogd._joined

    def observed(batches: Sequence[Params]) -> Params:
        counts.append(sum(map(ogd._count, batches)))
        return joined(batches)

    monkeypatch.setattr(ogd, "_joined", observed)
    OGD(samples=300, capacity=10).remember(finished(xp, gradients(np.random.default_rng(0), 300).T, batch=7))
    assert len(counts) > 10
    assert max(counts) <= 2 * 10 + 7


def test_directions_found_batch_by_batch_have_nearly_the_energy_of_the_svd(xp: Any) -> None:
    rows = gradients(np.random.default_rng(0), 200)
    best = np.linalg.svd(rows, compute_uv=False)[:6]
    basis = directions(OGD(capacity=6).remember(finished(xp, rows.T)))
    assert np.sum((rows @ basis.T) ** 2) > 0.99 * np.sum(best**2)


def test_tasks_share_the_capacity_and_give_up_their_last_directions(xp: Any) -> None:
    draw = np.random.default_rng(0)
    memory = OGD(capacity=10)
    blocks, first = [], None
    for _ in range(5):
        memory = memory.remember(finished(xp, gradients(draw, 12).T))
        blocks.append(memory.blocks)
        first = directions(memory)[:2] if first is None else first
    assert blocks == [(10,), (5, 5), (4, 3, 3), (3, 3, 2, 2), (2, 2, 2, 2, 2)]
    np.testing.assert_array_equal(directions(memory)[:2], first)  # The leading directions stay, to the bit.


def test_a_task_beyond_the_capacity_adds_no_direction(xp: Any) -> None:
    draw = np.random.default_rng(0)
    memory = OGD(capacity=2)
    for _ in range(3):
        memory = memory.remember(finished(xp, gradients(draw, 5).T))
    assert memory.blocks == (1, 1, 0)
    assert memory.rank == {"shared parameters": (2, WIDTH)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_remembering_the_same_task_twice_adds_no_direction(xp: Any, dtype: Any) -> None:
    rows = gradients(np.random.default_rng(0), 9, rank=5).astype(dtype)
    memory = OGD().remember(finished(xp, rows.T))
    assert memory.remember(finished(xp, rows.T)).blocks == (5, 0)


def test_no_more_samples_are_used_than_the_setting_says(xp: Any) -> None:
    asked = []

    class Counting(Finished):
        def logit_gradients(self, count: int) -> Iterator[Params]:
            asked.append(count)
            return super().logit_gradients(count)

    task = finished(xp, gradients(np.random.default_rng(0), 12).T, batch=5)
    memory = OGD(samples=7).remember(Counting(task.inputs, task.gradients, task.logits))
    assert asked == [7]
    assert memory.blocks == (7,)


def test_directions_are_ordered_by_their_energy(xp: Any) -> None:
    rows = gradients(np.random.default_rng(0), 12)
    basis = directions(OGD().remember(finished(xp, rows.T)))
    loads = np.sum((rows @ basis.T) ** 2, axis=0)
    np.testing.assert_allclose(loads, np.linalg.svd(rows, compute_uv=False) ** 2, rtol=1e-9)


def test_a_parameter_without_an_update_counts_as_zero(xp: Any) -> None:
    rows = gradients(np.random.default_rng(0), 3)
    memory = OGD().remember(finished(xp, rows.T))
    basis = directions(memory)
    update = np.random.default_rng(1).normal(size=WIDTH)
    padded = np.where(np.arange(WIDTH) < 12, update, 0.0)
    projected = memory.project({"fc.weight": to_xp(xp, update[:12].reshape(1, 12))})
    assert list(projected) == ["fc.weight"]
    np.testing.assert_allclose(
        to_numpy(projected["fc.weight"])[0], (padded - padded @ basis.T @ basis)[:12], atol=1e-12
    )


@pytest.mark.parametrize(("name", "settings"), [("number of samples", {"samples": 0}), ("capacity", {"capacity": 0})])
def test_numbers_below_1_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(BecameError, match=rf"^the OGD {name} is 0; it must be at least 1\.$"):
        OGD(**settings)


def test_bad_gradients_are_refused(xp: Any) -> None:
    memory = OGD().remember(Finished({}, {}, ({"a": xp.ones((1, 3)), "b": xp.ones((1, 2))},)))
    with pytest.raises(BecameError, match=r"^the gradients of OGD lack 'b'; give the same shared parameters for .*\.$"):
        memory.remember(Finished({}, {}, ({"a": xp.ones((1, 3))},)))
    with pytest.raises(BecameError, match=r"^the memory of OGD lack 'c'; give the same shared parameters for .*\.$"):
        memory.remember(Finished({}, {}, ({"a": xp.ones((1, 3)), "b": xp.ones((1, 2)), "c": xp.ones((1, 2))},)))
    with pytest.raises(
        BecameError, match=r"^gradients of 'b' have shape \(3,\); the memory's directions have \(2,\)\.$"
    ):
        memory.remember(Finished({}, {}, ({"a": xp.ones((1, 3)), "b": xp.ones((1, 3))},)))
    with pytest.raises(BecameError, match=r"^OGD remembers a task by its samples' gradients; none was given\.$"):
        OGD().remember(Finished({}, {}))
