"""Running statistics: how those of batches are combined, and when a learner gets new ones."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core.continual import Annealed, TaskStream, Training, build_method
from became_core.continual.learner import pooled, refresh_statistics, taps_of_shared_weights, weights_of
from became_core.continual.run_context import RunContext
from became_core.continual.state import Memory
from became_core.curvature import Tap, kronecker_factors
from reference.learner import ReferenceLearner
from tests.backends import to_numpy
from tests.streams import prototype_stream

STREAM = prototype_stream(per_class=12)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), offset=st.sampled_from([0.0, 1e4]))
def test_pooled_statistics_are_those_of_all_samples_at_once(xp: Any, sizes: list[int], offset: float) -> None:
    samples = offset + np.random.default_rng(len(sizes)).normal(size=(sum(sizes), 3))
    parts = np.split(samples, np.cumsum(sizes)[:-1])
    batches = []
    for part in parts:
        statistics = {"bn.running_mean": part.mean(axis=0), "bn.running_var": part.var(axis=0)}
        batches.append((len(part), {n: xp.asarray(value, dtype=xp.float64) for n, value in statistics.items()}))
    result = pooled(batches)
    np.testing.assert_allclose(to_numpy(result["bn.running_mean"]), samples.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(to_numpy(result["bn.running_var"]), samples.var(axis=0), rtol=1e-7, atol=1e-12)


class Running(ReferenceLearner):
    """A learner whose running statistics all equal one of its weights; it records the rows that it gets."""

    rows: np.ndarray[Any, Any]

    def __init__(self, stream: TaskStream) -> None:
        super().__init__(stream)
        self.running_statistics = frozenset({"bn.running_mean", "bn.running_var"})

    def parameters(self) -> Any:
        zeros = {name: np.zeros(2) for name in ("bn.running_mean", "bn.running_var")}
        return super().parameters() | getattr(self, "moments", zeros)

    def assign(self, parameters: Any) -> None:
        self.moments = {name: parameters[name] for name in self.running_statistics}
        super().assign(parameters)

    def batch_statistics(self, indices: Any, batch_size: int) -> Any:
        self.rows = indices
        first = float(super().parameters()["fc1.weight"][0, 0])
        yield len(indices), {name: np.full(2, first) for name in sorted(self.running_statistics)}


@pytest.mark.parametrize("batch_size", [8, 13, 1])
def test_statistics_use_all_training_images(batch_size: int) -> None:
    learner, task = Running(STREAM), STREAM.tasks[1]
    assert len(task.train) == 27
    refresh_statistics(learner, [task], batch_size, seed=3)
    assert len(set(learner.rows)) == len(learner.rows) == 27
    assert set(learner.rows) <= set(task.train)
    assert not np.array_equal(learner.rows, task.train)
    refresh_statistics(learner, STREAM.tasks[:2], 8, seed=3)
    assert set(learner.rows) == set(STREAM.tasks[0].train) | set(task.train)


def test_statistics_belong_to_the_weights_inside_and_after_a_context() -> None:
    learner = Running(STREAM)
    context = RunContext(
        learner, STREAM, build_method("finetune"), Training(Annealed(0.1, 1), Annealed(0.1, 1), batch_size=8), seed=3
    )
    before = learner.parameters()
    weights = {name: value + 0.5 for name, value in weights_of(learner).items()}
    assert set(weights) == set(before) - learner.running_statistics
    with context.at(STREAM.tasks[0], weights, Memory()):
        for name in learner.running_statistics:
            np.testing.assert_array_equal(learner.parameters()[name], weights["fc1.weight"][0, 0])
    for name, value in learner.parameters().items():
        np.testing.assert_array_equal(value, before[name])
    context.move_to(STREAM.tasks[0], weights, Memory())
    for name in learner.running_statistics:
        np.testing.assert_array_equal(learner.parameters()[name], weights["fc1.weight"][0, 0])


def test_a_learner_without_running_statistics_is_unchanged() -> None:
    learner = ReferenceLearner(STREAM)
    before = learner.parameters()
    refresh_statistics(learner, STREAM.tasks[:1], 8, seed=3)
    assert all(np.array_equal(value, before[name]) for name, value in learner.parameters().items())


class _Turned:
    """A region whose inputs beneath are twice those of the network."""

    rowwise = frozenset({"fc.weight"})

    def inputs_beneath(self, name: str, inputs: Any) -> Any:
        assert name == "fc.weight"
        return inputs * 2


def test_the_sets_of_taps_of_a_batch_share_their_inputs_beneath_a_region() -> None:
    """By which Kronecker factors count them once, in the mode "true" as in any other."""
    region: Any = _Turned()

    def batches() -> Iterator[dict[str, Tap]]:
        for inputs in (np.ones((2, 1, 3)), np.full((2, 1, 3), 5.0)):
            for gradients in (np.ones((2, 1, 4)), -np.ones((2, 1, 4))):
                yield {"fc": Tap("matrix", inputs, gradients), "out": Tap("matrix", inputs, gradients)}

    taps = list(taps_of_shared_weights(region, batches()))
    assert [float(each["fc"].inputs[0, 0, 0]) for each in taps] == [2, 2, 10, 10]
    assert [float(each["out"].inputs[0, 0, 0]) for each in taps] == [1, 1, 5, 5]
    once = kronecker_factors(iter(taps), samples=4).factors["fc.weight"][0]
    np.testing.assert_array_equal(once, np.full((3, 3), (2 * 4 + 2 * 100) / 4))


def test_the_reference_learners_inputs_count_once_for_all_classes() -> None:
    stream = prototype_stream(tasks=2, side=4)
    learner, rows = ReferenceLearner(stream, hidden=(6, 5), seed=1), stream.tasks[0].train[:8]
    of_inputs = [
        kronecker_factors(learner.taps(0, rows, 4, mode, np.random.default_rng(0)), samples=8).factors
        for mode in ("empirical", "true")
    ]
    for name, (inputs, _) in of_inputs[0].items():
        np.testing.assert_allclose(of_inputs[1][name][0], inputs, rtol=1e-12)
