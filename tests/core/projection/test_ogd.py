"""OGD against Gram and Schmidt on all gradients at once, whole and as products, and the bounds of its memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.arrays import Params
from became_core.projection import OGD, Products
from reference.projection import ogd_directions
from tests.backends import to_numpy, to_xp
from tests.compilers import compiled
from tests.projections import Finished, finished, orthonormal
from tests.strategies import few_if_compiled

Array = NDArray[np.float64]
WIDTH = 24


def gradients(draw: np.random.Generator, samples: int, rank: int = WIDTH) -> Array:
    """Return gradients as rows [samples, WIDTH], in a random subspace, with falling energy along its directions."""
    span = np.linalg.qr(draw.normal(size=(WIDTH, WIDTH)))[0][:rank]
    return np.asarray(draw.normal(size=(samples, rank)) * 1.5 ** -np.arange(rank) @ span)


def directions(memory: OGD) -> Array:
    return orthonormal(memory, ("fc.weight", "fc.bias"))


@given(
    samples=few_if_compiled(st.lists(st.integers(1, 10), min_size=1, max_size=4), [[1], [10, 4, 10]]),
    capacity=few_if_compiled(st.integers(20, 40), [20, 40]),
    batch=few_if_compiled(st.integers(1, 6), [4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_directions_are_those_of_gram_and_schmidt(
    xp: Any, samples: list[int], capacity: int, batch: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    memory, tasks = OGD(capacity=capacity), []
    for number in samples:
        tasks.append(gradients(draw, number))
        memory = memory.remember(finished(xp, tasks[-1].T, batch=batch))
        ours, theirs = directions(memory), ogd_directions(tasks, capacity)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        np.testing.assert_allclose(ours @ ours.T, np.eye(len(ours)), atol=1e-10)


@given(batch=few_if_compiled(st.integers(1, 7), [1, 7]), seed=st.integers(0, 2**32 - 1))
def test_of_many_samples_in_few_dimensions_as_many_are_kept(xp: Any, batch: int, seed: int) -> None:
    """60 gradients lie in 5 dimensions and the capacity is 6, so they are chosen many times without loss."""
    rows = gradients(np.random.default_rng(seed), 60, rank=5)
    memory = OGD(capacity=6).remember(finished(xp, rows.T, batch=batch))
    basis = directions(memory)
    assert memory.rank == {"shared parameters": (5, WIDTH)}
    np.testing.assert_allclose(rows @ basis.T @ basis, rows, atol=1e-12)


def test_memory_holds_at_most_twice_the_share_and_one_batch(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from became_core.projection import ogd

    counts = []
    chosen = ogd._chosen

    def observed(gradients: dict[str, Any], old: int, most: int) -> tuple[dict[str, Any], Any]:
        counts.append(ogd._count(gradients))
        return chosen(gradients, old, most)

    monkeypatch.setattr(ogd, "_chosen", observed)
    OGD(samples=300, capacity=10).remember(finished(xp, gradients(np.random.default_rng(0), 300).T, batch=7))
    assert len(counts) > 10
    assert max(counts) <= 2 * 10 + 7


def test_gradients_chosen_batch_by_batch_have_nearly_the_energy_of_the_svd(xp: Any) -> None:
    rows = gradients(np.random.default_rng(0), 200)
    best = np.linalg.svd(rows, compute_uv=False)[:6]
    basis = directions(OGD(capacity=6).remember(finished(xp, rows.T)))
    assert np.sum((rows @ basis.T) ** 2) > 0.9 * np.sum(best**2)


def test_tasks_share_the_capacity_and_give_up_their_last_directions(xp: Any) -> None:
    draw = np.random.default_rng(0)
    memories = [OGD(capacity=10)]
    for _ in range(5):
        memories.append(memories[-1].remember(finished(xp, gradients(draw, 12).T)))
    _, first, *_, last = memories
    assert [m.blocks for m in memories] == [(), (10,), (5, 5), (4, 3, 3), (3, 3, 2, 2), (2, 2, 2, 2, 2)]
    # The leading gradients stay to the bit. Their directions are computed anew, from more inner products at a time.
    for name, leaf in last.gradients.items():
        np.testing.assert_array_equal(to_numpy(leaf.values)[:2], to_numpy(first.gradients[name].values)[:2])
    np.testing.assert_allclose(directions(last)[:2], directions(first)[:2], atol=1e-12)


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


def test_the_longest_gradient_is_kept_first_and_then_the_farthest(xp: Any) -> None:
    rows = np.zeros((4, WIDTH))
    rows[0, 0], rows[1, :2], rows[2, 1], rows[3, 2] = 3.0, (5.0, 1.0), 0.5, 0.75
    memory = OGD(capacity=3).remember(finished(xp, rows.T))
    kept = np.concatenate([to_numpy(leaf.values).reshape(3, -1) for leaf in memory.gradients.values()], axis=1)
    np.testing.assert_array_equal(kept, rows[[1, 3, 0]])  # Of 3 e_0, 0.59 is outside the span of the first.


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


def linear_layer(draw: np.random.Generator, samples: int, dtype: Any = np.float64) -> tuple[Array, Array]:
    """Return the factors of gradients by a weight [4, 6]."""
    return draw.normal(size=(samples, 4)).astype(dtype), draw.normal(size=(samples, 6)).astype(dtype)


def of_layer(xp: Any, factors: tuple[Array, Array], *, whole: bool) -> Finished:
    """Return a task with gradients by a weight, whole or as products, and by a bias."""
    left, right = factors
    parts = []
    for rows in (slice(0, 3), slice(3, len(left))):
        g, a = to_xp(xp, left[rows]), to_xp(xp, right[rows])
        weight: Any = to_xp(xp, left[rows][:, :, None] * right[rows][:, None, :]) if whole else Products(g, a)
        parts.append({"fc.weight": weight, "fc.bias": g})
    return Finished({}, {}, tuple(parts))


@given(seed=st.integers(0, 2**32 - 1))
def test_products_are_projected_as_whole_gradients_are(xp: Any, seed: int) -> None:
    draw = np.random.default_rng(seed)
    tasks = [linear_layer(draw, 7) for _ in range(3)]
    update = {"fc.weight": draw.normal(size=(4, 6)), "fc.bias": draw.normal(size=4)}
    whole = products = OGD(capacity=10)
    for factors in tasks:
        whole = whole.remember(of_layer(xp, factors, whole=True))
        products = products.remember(of_layer(xp, factors, whole=False))
        assert products.rank == whole.rank
        ours, theirs = products.project(to_xp(xp, update)), whole.project(to_xp(xp, update))
        for name, expected in theirs.items():
            np.testing.assert_allclose(to_numpy(ours[name]), to_numpy(expected), atol=1e-9)
    assert {name: leaf.shape for name, leaf in products.to_arrays().items()} == {
        "left.fc.weight": (10, 4),
        "right.fc.weight": (10, 6),
        "gradients.fc.bias": (10, 4),
        "whitening": (10, 10),
        "blocks": (3,),
    }


@pytest.mark.parametrize("kinds", [(True, False), (False, True)], ids=["products after whole", "whole after products"])
def test_a_layer_may_have_products_in_one_task_and_whole_gradients_in_another(
    xp: Any, kinds: tuple[bool, bool]
) -> None:
    draw = np.random.default_rng(0)
    tasks = [linear_layer(draw, 5) for _ in range(2)]
    update = {"fc.weight": draw.normal(size=(4, 6)), "fc.bias": draw.normal(size=4)}
    mixed = alike = OGD()
    for factors, whole in zip(tasks, kinds, strict=True):
        mixed = mixed.remember(of_layer(xp, factors, whole=whole))
        alike = alike.remember(of_layer(xp, factors, whole=True))
    for name, expected in alike.project(to_xp(xp, update)).items():
        np.testing.assert_allclose(to_numpy(mixed.project(to_xp(xp, update))[name]), to_numpy(expected), atol=1e-12)


def test_products_are_restored_from_arrays_and_compiled(xp: Any, backend: str) -> None:
    draw = np.random.default_rng(0)
    memory = OGD().remember(of_layer(xp, linear_layer(draw, 5), whole=False))
    update = to_xp(xp, {"fc.weight": draw.normal(size=(4, 6)), "fc.bias": draw.normal(size=4)})
    restored = OGD().with_arrays(memory.to_arrays())
    jitted = compiled(backend, lambda memory, update: memory.project(update))(memory, update)
    for name, expected in memory.project(update).items():
        np.testing.assert_array_equal(to_numpy(restored.project(update)[name]), to_numpy(expected))
        np.testing.assert_allclose(to_numpy(jitted[name]), to_numpy(expected), atol=1e-12)


@pytest.mark.parametrize("missing", ["blocks", "whitening", "left.fc.weight", "right.fc.weight"])
def test_a_memory_of_which_a_part_is_missing_is_refused(xp: Any, missing: str) -> None:
    arrays = OGD().remember(of_layer(xp, linear_layer(np.random.default_rng(0), 5), whole=False)).to_arrays()
    del arrays[missing]
    with pytest.raises(BecameError, match=rf"^the memory of OGD lacks '{missing}', .*\.$"):
        OGD().with_arrays(arrays)


def test_a_gradient_of_zeros_is_no_direction(xp: Any) -> None:
    draw = np.random.default_rng(0)
    rows = gradients(draw, 3)
    rows[1] = 0.0
    assert OGD().remember(finished(xp, rows.T)).blocks == (2,)
    nothing = OGD().remember(finished(xp, 0.0 * rows.T))
    assert nothing.blocks == (0,)
    update = to_xp(xp, {"fc.weight": draw.normal(size=(1, 12)), "fc.bias": draw.normal(size=12)})
    for name, value in nothing.project(update).items():
        np.testing.assert_array_equal(to_numpy(value), to_numpy(update[name]))


def test_bad_gradients_are_refused(xp: Any) -> None:
    memory = OGD().remember(Finished({}, {}, ({"a": xp.ones((1, 3)), "b": xp.ones((1, 2))},)))
    with pytest.raises(BecameError, match=r"^the gradients of OGD lack 'b'; give the same shared parameters for .*\.$"):
        memory.remember(Finished({}, {}, ({"a": xp.ones((1, 3))},)))
    with pytest.raises(BecameError, match=r"^the memory of OGD lack 'c'; give the same shared parameters for .*\.$"):
        memory.remember(Finished({}, {}, ({"a": xp.ones((1, 3)), "b": xp.ones((1, 2)), "c": xp.ones((1, 2))},)))
    with pytest.raises(BecameError, match=r"^gradients of 'b' have shape \(3,\); the memory's have \(2,\)\.$"):
        memory.remember(Finished({}, {}, ({"a": xp.ones((1, 3)), "b": xp.ones((1, 3))},)))
    with pytest.raises(BecameError, match=r"^OGD remembers a task by its samples' gradients; none was given\.$"):
        OGD().remember(Finished({}, {}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(xp: Any, value: float) -> None:
    representation = np.random.default_rng(0).normal(size=(WIDTH, 3))
    representation[0, 1] = value
    with pytest.raises(BecameError, match="the gradients of the logits are not finite; look for NaN in the network"):
        OGD().remember(finished(xp, representation))
