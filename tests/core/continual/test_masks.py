"""HAT and PackNet in whole runs: the logits of old tasks do not change, and how much of the network is used."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from became_core.continual import (
    SGD,
    Adam,
    Annealed,
    EpochEnd,
    Optimiser,
    RunRecord,
    TaskEnd,
    Training,
    build_method,
    learn,
)
from reference.learner import ReferenceLearner
from tests.conformance import listened
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream()
GENTLE = {"hat_sharpness": 20.0, "hat_sparsity": 0.1}  # for so small a network and so few steps
Weights = dict[str, NDArray[np.float64]]


def run(
    name: str, optimiser: Optimiser | None = None, settings: Mapping[str, Any] | None = None
) -> tuple[RunRecord, list[list[list[NDArray[np.float64]]]], list[Weights]]:
    """Run a method; return the record, what was said at each task's end of each task, and the weights there."""
    optimiser = optimiser or SGD()
    rate, epochs = (0.02, 18) if isinstance(optimiser, Adam) else (0.2, 6)
    training = Training(Annealed(rate, epochs), Annealed(rate, epochs // 2), optimiser=optimiser, batch_size=16)
    learner = ReferenceLearner(STREAM, bias=True)
    said, hear = listened(learner, STREAM)
    weights: list[Weights] = []

    def observe(event: EpochEnd | TaskEnd) -> None:
        hear(event)
        if isinstance(event, TaskEnd):
            weights.append(learner.parameters())

    record = learn(learner, STREAM, build_method(name, settings or GENTLE), training, callbacks=[Listening(observe)])
    return record, said, weights


@pytest.mark.parametrize("optimiser", [SGD(), SGD(momentum=0.9, weight_decay=0.01), Adam(weight_decay=0.01)], ids=str)
@pytest.mark.parametrize("name", ["packnet", "hat"])
def test_the_logits_of_an_old_task_do_not_change_to_the_bit(name: str, optimiser: Optimiser) -> None:
    record, said, weights = run(name, optimiser)
    for task in range(3):
        then = said[task][task][-1]
        for later in range(task + 1, 3):
            assert any(np.array_equal(then, now) for now in said[later][task])
            assert record.accuracy[later, task] == record.accuracy[task, task]
    # The weights themselves have moved, and other methods do not keep those bits.
    assert not np.array_equal(weights[0]["fc1.weight"], weights[2]["fc1.weight"])
    assert np.min(np.diagonal(record.accuracy)) > 60  # every task is learned, chance being a third
    _, others, _ = run("gpm", optimiser)
    assert not any(np.array_equal(others[0][0][-1], now) for now in others[2][0])


def test_packnet_reports_its_capacity_and_leaves_pruned_weights_zero() -> None:
    record, _, weights = run("packnet", settings={"packnet_share": 0.75})
    size = weights[0]["fc1.weight"].size
    used = [ranks["fc1.weight"] for ranks in record.ranks]
    free = size
    for (owned, whole), theta in zip(used, weights, strict=True):
        free = int(0.75 * free)
        assert (owned, whole) == (size - free, size)
        assert int(np.sum(theta["fc1.weight"] != 0)) == owned
    assert record.memory == [sum(weights[0][name].size for name in ("fc1.weight", "fc2.weight"))] * 3  # a byte each
    assert record.epochs == [9, 9, 9]
    for frozen in ("fc1.bias", "fc2.bias"):
        np.testing.assert_array_equal(weights[0][frozen], weights[2][frozen])
        assert np.any(weights[0][frozen] != 0)


def test_packnet_retrains_at_its_own_rate_and_shares_the_weights_equally() -> None:
    settings = {"packnet_even": True, "packnet_retraining": 0.1}
    record, _, weights = run("packnet", settings=settings)
    size = weights[0]["fc1.weight"].size
    owned = [ranks["fc1.weight"][0] for ranks in record.ranks]
    assert [abs(used - size * (task + 1) / 3) < 2 for task, used in enumerate(owned)] == [True] * 3
    assert owned[-1] == size
    for curve in record.curves:
        first, second = ([event.rate for event in curve if event.stage == stage] for stage in (1, 2))
        assert second[0] < 0.15 * max(first)


def test_packnet_learns_later_tasks_worse_if_it_prunes_less() -> None:
    """A weight that is not pruned is not free; at a share near 0 the first task takes almost the whole network."""
    greedy, modest = (run("packnet", settings={"packnet_share": share})[0].accuracy for share in (0.0, 0.75))
    assert np.mean(np.diagonal(modest)[1:]) > np.mean(np.diagonal(greedy)[1:])


def test_hat_uses_fewer_units_at_a_higher_cost_and_freezes_biases() -> None:
    used = {}
    for cost in (0.0, 0.1, 2.0):
        settings = {"hat_sharpness": 20.0, "hat_sparsity": cost}
        record, _, weights = run("hat", settings=settings)
        used[cost] = record.ranks[0]["fc2.weight"][0]
        capacity = [ranks["fc2.weight"] for ranks in record.ranks]
        assert capacity == sorted(capacity)
        np.testing.assert_array_equal(weights[0]["fc1.bias"], weights[2]["fc1.bias"])
        assert record.memory == [40 * task for task in (1, 2, 3)]  # a byte a unit
    assert used[0.0] > used[0.1] > used[2.0]
