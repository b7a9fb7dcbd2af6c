"""The memory of HAT: which weights it freezes, and the effective weights of each task."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.projection import HAT, UnitGraph, full
from tests.backends import to_numpy, to_xp
from tests.projections import Finished, Started

# A convolution with 3 filters of 2x2, flattened to 3 units with 4 positions each; then 5 units, and heads of 2 classes.
SHAPES = {"conv.weight": (3, 1, 2, 2), "fc.weight": (5, 12), "heads.0.weight": (2, 5), "heads.1.weight": (2, 5)}
ORDER = ("conv.weight", "fc.weight")
GRAPH = UnitGraph(ORDER, ((), ("conv.weight",), ("fc.weight",)), ("heads.0.weight", "heads.1.weight"))
Weights = dict[str, NDArray[np.float64]]


def weights(seed: int) -> Weights:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape) for name, shape in SHAPES.items()}


def learned(xp: Any, tasks: int, seed: int = 0) -> tuple[HAT, list[dict[str, NDArray[np.bool_]]]]:
    """Return a memory of tasks with random gates, and these gates by layer."""
    memory, gates = HAT(unit_graph=GRAPH), []
    for task in range(tasks):
        region = memory.begin_task(Started(task, to_xp(xp, weights(0)), np.random.default_rng([seed, task])))
        keys = ("fc.weight@gates", f"heads.{task}.weight@gates")
        assert tuple(region.scales) == keys
        gates.append({name: to_numpy(region.scales[key]) > 0 for name, key in zip(ORDER, keys, strict=True)})
        memory = memory.end_stage(task, region).remember(Finished({}, {}))
    return memory, gates


@given(seed=st.integers(0, 200))
def test_only_weights_between_two_units_in_use_are_frozen(xp: Any, seed: int) -> None:
    memory, gates = learned(xp, 2, seed)
    conv, fc = (gates[0][name] | gates[1][name] for name in ORDER)
    update = weights(1)
    projected = {name: to_numpy(value) for name, value in memory.project(to_xp(xp, update)).items()}
    frozen = conv[:, None, None, None] & np.ones(SHAPES["conv.weight"], dtype=bool)
    np.testing.assert_array_equal(projected["conv.weight"], np.where(frozen, 0, update["conv.weight"]))
    frozen = fc[:, None] & np.repeat(conv, 4)[None, :]
    np.testing.assert_array_equal(projected["fc.weight"], np.where(frozen, 0, update["fc.weight"]))
    np.testing.assert_array_equal(projected["heads.1.weight"], update["heads.1.weight"])


@given(seed=st.integers(0, 200))
def test_the_outputs_of_an_old_task_do_not_change_to_the_bit(xp: Any, seed: int) -> None:
    memory, gates = learned(xp, 1, seed)
    theta = to_xp(xp, weights(2))
    moved = memory.project(to_xp(xp, weights(3)))
    after = {name: value + (moved[name] if name in ORDER else 0 * value) for name, value in theta.items()}
    view = memory.view(0)
    assert view.weights == {"fc.weight", "heads.0.weight"}
    results = []
    for parameters in (theta, after):
        w = {name: to_numpy(value) for name, value in view.effective(parameters).items()}
        hidden = np.repeat(w["conv.weight"].reshape(3, -1).sum(axis=1), 4)
        hidden = w["fc.weight"] @ hidden
        results.append((w["heads.0.weight"] @ hidden, hidden[gates[0]["fc.weight"]]))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    closed = ~np.repeat(gates[0]["conv.weight"], 4)
    assert not np.any(to_numpy(view.effective(theta)["fc.weight"])[:, closed])


# A first layer, two more layers whose outputs are added to its own, and a head that reads the sum of all three.
SUM = ("stem.weight", "one.weight", "two.weight")
SUMMED = UnitGraph(SUM, ((), SUM[:1], SUM[:2], SUM), ("heads.0.weight", "heads.1.weight"))


def outputs_of_the_sum(w: Weights, task: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the outputs of the head, and the units that it reads."""
    units = np.tanh(w["stem.weight"] @ np.arange(1.0, 4.0))
    units = units + np.tanh(w["one.weight"] @ units)
    units = units + np.tanh(w["two.weight"] @ units)
    return w[f"heads.{task}.weight"] @ units, units


@given(seed=st.integers(0, 200))
def test_the_outputs_of_an_old_task_do_not_change_if_units_are_added_up(xp: Any, seed: int) -> None:
    draw = np.random.default_rng(seed)
    shapes = {"stem.weight": (6, 3), "one.weight": (6, 6), "two.weight": (6, 6), "heads.0.weight": (2, 6)}
    theta, step = ({name: draw.normal(size=shape) for name, shape in shapes.items()} for _ in range(2))
    memory = HAT(unit_graph=SUMMED)
    region = memory.begin_task(Started(0, to_xp(xp, theta), draw))
    assert tuple(region.scales) == ("one.weight@gates", "two.weight@gates", "heads.0.weight@gates")
    opened = {key.partition("@")[0]: to_numpy(value) > 0 for key, value in region.scales.items()}
    memory = memory.end_stage(0, region)
    np.testing.assert_array_equal(to_numpy(memory.used("stem.weight")), np.any(list(opened.values()), axis=0))
    np.testing.assert_array_equal(to_numpy(memory.used("two.weight")), opened["heads.0.weight"])
    moved = {name: to_numpy(value) for name, value in memory.project(to_xp(xp, step)).items() if name in SUM}
    view = memory.view(0)
    outcomes = []
    for by in (0.0, 1.0):
        weights = {name: value + by * moved.get(name, 0.0) for name, value in theta.items()}
        effective = {name: to_numpy(value) for name, value in view.effective(to_xp(xp, weights)).items()}
        outcomes.append(outputs_of_the_sum(effective, 0))
    np.testing.assert_array_equal(outcomes[0][0], outcomes[1][0])
    before, after = (units[opened["heads.0.weight"]] for _, units in outcomes)
    np.testing.assert_array_equal(before, after)
    frozen = to_numpy(memory.used("two.weight"))[:, None] & opened["two.weight"][None, :]
    np.testing.assert_array_equal(moved["two.weight"] == 0, frozen)
    later = memory.begin_task(Started(1, to_xp(xp, theta), draw))
    np.testing.assert_array_equal(to_numpy(later.unused["heads.1.weight@gates"]), ~opened["heads.0.weight"])


def test_capacity_is_counted_in_pairs_of_units(xp: Any) -> None:
    memory, gates = learned(xp, 2, 7)
    conv, fc = (int(np.sum(gates[0][name] | gates[1][name])) for name in ORDER)
    assert memory.rank == {"conv.weight": (conv, 3), "fc.weight": (conv * fc, 15)}
    assert full(memory) == {name for name, (used, all_) in memory.rank.items() if used == all_}
    empty = HAT(unit_graph=GRAPH)
    update = to_xp(xp, weights(0))
    assert (empty.rank, empty.project(update), empty.rowwise) == ({}, update, frozenset())
    assert memory.project_rows("fc.weight", update["fc.weight"]) is update["fc.weight"]


def test_the_unused_units_of_a_new_task_are_those_that_no_old_task_uses(xp: Any) -> None:
    memory, gates = learned(xp, 1)
    region = memory.begin_task(Started(1, to_xp(xp, weights(0)), np.random.default_rng(5)))
    for name, key in zip(ORDER, ("fc.weight@gates", "heads.1.weight@gates"), strict=True):
        np.testing.assert_array_equal(to_numpy(region.unused[key]), ~gates[0][name])


def test_a_memory_is_restored_from_its_arrays(xp: Any) -> None:
    memory, _ = learned(xp, 2)
    restored = HAT(unit_graph=GRAPH).with_arrays(memory.to_arrays())
    assert (restored.tasks, restored.rank) == (2, memory.rank)
    for name in ("fc.weight", "heads.1.weight"):
        theta = to_xp(xp, weights(1))
        expected = to_numpy(memory.view(1).effective(theta)[name])
        np.testing.assert_array_equal(to_numpy(restored.view(1).effective(theta)[name]), expected)
    with pytest.raises(BecameError, match=r"the array 'bases\.fc' is no part of a memory of HAT"):
        HAT().with_arrays({"bases.fc": np.ones(1)})
    with pytest.raises(BecameError, match="the memory of HAT lacks 'tasks'"):
        HAT().with_arrays({})


@pytest.mark.parametrize("numbers", [(1.0, 0.75), (400.0, -0.1)])
def test_settings_out_of_range_are_refused(numbers: tuple[float, float]) -> None:
    with pytest.raises(BecameError, match="give above 1 and at least 0"):
        HAT(*numbers)
