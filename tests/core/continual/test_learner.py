"""Running statistics: how those of batches are combined, and when a learner gets new ones."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core.continual import Annealed, TaskStream, Training, build_method
from became_core.continual.learner import pooled, refresh_statistics, weights_of
from became_core.continual.run_context import RunContext
from became_core.continual.state import Memory
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
