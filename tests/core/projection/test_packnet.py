"""The masks of PackNet: what is pruned, which task owns it, and that owned weights do not move."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.arrays import Params
from became_core.projection import PackNet, full
from tests.backends import to_numpy, to_xp
from tests.projections import Finished, Started

NAMES = frozenset({"conv.weight", "fc.weight"})
SHAPES = {"conv.weight": (3, 2, 2, 2), "fc.weight": (4, 5), "fc.bias": (4,)}
DONE = Finished({}, {})
Weights = dict[str, NDArray[np.float64]]


def weights(seed: int) -> Weights:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape) for name, shape in SHAPES.items()}


def numbers(params: Params) -> dict[str, NDArray[Any]]:
    return {name: to_numpy(value) for name, value in params.items()}


def packed(xp: Any, share: float, tasks: int) -> tuple[PackNet, list[Params]]:
    """Return a memory of tasks, each trained with random updates in both stages, and all weights after each task."""
    memory, theta = PackNet(share), to_xp(xp, {name: np.zeros(shape) for name, shape in SHAPES.items()})
    after = []
    for task in range(tasks):
        moves = memory.project(to_xp(xp, weights(task)))
        theta = {name: value + moves[name] for name, value in theta.items()}
        memory, theta = memory.between_stages(theta, NAMES)
        moves = memory.project(to_xp(xp, weights(100 + task)))
        theta = {name: value + moves[name] for name, value in theta.items()}
        memory = memory.remember(DONE)
        after.append(theta)
    return memory, after


@given(share=st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]), seed=st.integers(0, 1000))
def test_the_smallest_weights_of_each_layer_are_pruned_and_the_others_unchanged(
    xp: Any, share: float, seed: int
) -> None:
    theta = weights(seed)
    memory, after = PackNet(share).between_stages(to_xp(xp, theta), NAMES)
    for name in NAMES:
        result, pruned = to_numpy(after[name]), int(share * theta[name].size)
        survives = to_numpy(memory.owners[name]) == 1
        assert int(np.sum(~survives)) == pruned
        np.testing.assert_array_equal(result, np.where(survives, theta[name], 0))
        if pruned:
            assert np.abs(theta[name][~survives]).max() <= np.abs(theta[name][survives]).min()
    np.testing.assert_array_equal(to_numpy(after["fc.bias"]), theta["fc.bias"])


def test_the_share_is_pruned_exactly_if_magnitudes_are_equal(xp: Any) -> None:
    memory, _ = PackNet(0.5).between_stages(to_xp(xp, {"fc.weight": np.ones((3, 3))}), frozenset({"fc.weight"}))
    assert int(np.sum(to_numpy(memory.owners["fc.weight"]))) == 5


@given(share=st.sampled_from([0.25, 0.5, 0.75]), tasks=st.integers(2, 3))
def test_the_view_of_an_old_task_does_not_change_to_the_bit(xp: Any, share: float, tasks: int) -> None:
    memory, after = packed(xp, share, tasks)
    for task in range(tasks):
        then, now = (numbers(memory.view(task).effective(after[moment])) for moment in (task, -1))
        for name in NAMES:
            np.testing.assert_array_equal(then[name], now[name])
            np.testing.assert_array_equal(to_numpy(after[task][name]), then[name])  # Pruned weights are zero.
            latest = numbers(memory.view(tasks - 1).effective(after[-1]))[name]
            assert np.any(now[name] != latest) == (task < tasks - 1)
    assert memory.view(0).weights == NAMES


def test_each_stage_moves_only_its_own_weights(xp: Any) -> None:
    update = to_xp(xp, {name: np.ones(shape) for name, shape in SHAPES.items()})
    first = PackNet(0.5)
    assert first.project(update) == update  # All weights are free.
    first, _ = first.between_stages(to_xp(xp, weights(0)), NAMES)
    owned = numbers(first.owners)["fc.weight"] == 1
    np.testing.assert_array_equal(numbers(first.project(update))["fc.weight"], owned)
    done = first.remember(DONE)
    np.testing.assert_array_equal(numbers(done.project(update))["fc.weight"], ~owned)
    assert done.project(update)["fc.bias"] is update["fc.bias"]
    assert done.project_rows("fc.weight", update["fc.weight"]) is update["fc.weight"]


def test_rank_counts_the_owned_entries_of_each_weight(xp: Any) -> None:
    memory, _ = packed(xp, 0.5, 3)
    assert memory.rank == {"conv.weight": (12 + 6 + 3, 24), "fc.weight": (10 + 5 + 3, 20)}
    assert full(memory) == frozenset()
    assert full(packed(xp, 0.0, 1)[0]) == NAMES


def test_a_memory_is_restored_from_its_arrays(xp: Any) -> None:
    memory, after = packed(xp, 0.5, 2)
    for stored in (memory, memory.between_stages(after[-1], NAMES)[0]):
        restored = PackNet(0.5).with_arrays(stored.to_arrays())
        assert (restored.tasks, restored.retrains) == (stored.tasks, stored.retrains)
        for name in NAMES:
            np.testing.assert_array_equal(to_numpy(restored.owners[name]), to_numpy(stored.owners[name]))
    arrays = memory.to_arrays()
    with pytest.raises(BecameError, match=r"the array 'bases\.fc' is no part of a memory of PackNet"):
        PackNet().with_arrays({**arrays, "bases.fc": arrays["tasks"]})
    with pytest.raises(BecameError, match="the memory of PackNet lacks 'tasks'"):
        PackNet().with_arrays({name: value for name, value in arrays.items() if name != "tasks"})


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(BecameError, match="it must be at least 0 and below 1"):
        PackNet(share)


def test_more_than_255_tasks_are_refused(xp: Any) -> None:
    memory = PackNet(tasks=255)
    with pytest.raises(BecameError, match="tell 255 tasks apart; there is one more"):
        memory.between_stages(to_xp(xp, weights(0)), NAMES)


class StartedOfMany(Started):
    """A task that begins in a network with a head for each task."""

    @property
    def heads(self) -> list[frozenset[str]]:
        return [frozenset({name}) for name in self.weights if name.startswith("heads.")]


@pytest.mark.parametrize("tasks", [1, 2, 3, 4])
def test_equal_shares_give_every_task_as_many_weights_and_leave_none(xp: Any, tasks: int) -> None:
    heads = {f"heads.{task}.weight": np.zeros((2, 4)) for task in range(tasks)}
    memory, theta = PackNet(equal_shares=True), to_xp(xp, {"fc.weight": weights(1)["fc.weight"][:, :3]} | heads)
    for task in range(tasks):
        memory = memory.prepare(StartedOfMany(task, theta))
        memory, theta = memory.between_stages(theta, frozenset({"fc.weight"}))
        memory = memory.remember(DONE)
    owners = to_numpy(memory.owners["fc.weight"])
    assert [int(np.sum(owners == owner)) for owner in range(tasks + 1)] == [0] + [12 // tasks] * tasks


def test_a_retraining_rate_that_is_no_rate_is_refused() -> None:
    with pytest.raises(BecameError, match=r"PackNet retrains at 0\.0 of the learning rate; it must be above 0"):
        PackNet(retraining_rate=0.0)
