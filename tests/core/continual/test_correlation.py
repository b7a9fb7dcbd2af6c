"""Correlations from sums: those of NumPy, in however many parts the samples come, and where there is none."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from became_core.continual.correlation import correlation, correlation_sums
from became_core.continual.evaluation import accuracies
from reference.learner import ReferenceLearner
from tests.streams import drifting_stream


@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(3, 40),
    outputs=st.integers(1, 3),
    share=st.floats(-1, 1),
    mean=st.floats(-10, 10),
    scale=st.floats(1e-3, 1e3),
    parts=st.integers(1, 5),
)
def test_sums_of_parts_have_the_correlation_of_numpy(
    seed: int, samples: int, outputs: int, share: float, mean: float, scale: float, parts: int
) -> None:
    draw = np.random.default_rng(seed)
    targets = draw.normal(size=(samples, outputs))
    predictions = scale * (mean + share * targets + (1 - abs(share)) * draw.normal(size=targets.shape))
    assume(min(predictions.std(axis=0).min() / scale, targets.std(axis=0).min()) > 0.1)
    sides = zip(np.array_split(predictions, parts), np.array_split(targets, parts), strict=True)
    found = correlation(sum(correlation_sums(*sides_of_part) for sides_of_part in sides))  # type: ignore[arg-type]
    expected = np.mean([np.corrcoef(predictions[:, j], targets[:, j])[0, 1] for j in range(outputs)])
    assert found == pytest.approx(expected, abs=1e-10)  # of sums, rounding grows with the square of mean / deviation


@pytest.mark.parametrize("constant", [0.1, -3e7, 1e-9])
def test_a_constant_prediction_has_none_and_constant_targets_leave_it_undefined(constant: float) -> None:
    numbers = np.random.default_rng(0).normal(size=(1000, 1))
    same = np.full((1000, 1), constant, np.float32)
    assert correlation(correlation_sums(same, numbers)) == 0
    assert math.isnan(correlation(correlation_sums(numbers, same)))
    assert math.isnan(correlation(correlation_sums(np.hstack([numbers, numbers]), np.hstack([numbers, same]))))
    assert correlation(correlation_sums(-numbers, numbers)) == -1
    nearly = same * (1 + np.float32(1e-5) * numbers.astype(np.float32))
    assert abs(correlation(correlation_sums(nearly, numbers))) > 0.99  # what does vary is no constant


@pytest.mark.parametrize("shared_head", [True, False])
def test_tasks_of_numbers_are_correlated_batch_by_batch(shared_head: bool) -> None:
    stream = drifting_stream(shared_head=shared_head)
    learner = ReferenceLearner(stream)
    learner.likelihood = stream.dataset.likelihood
    if shared_head:
        learner.heads = [frozenset() for _ in stream.tasks]
    for task, found in zip(stream.tasks, accuracies(learner, stream.tasks, batch_size=3).correlation, strict=True):
        outputs = learner.logits(task.test, 1000)[:, 0 if shared_head else task.index]
        targets = stream.targets[task.test]
        expected = np.mean([np.corrcoef(outputs[:, j], targets[:, j])[0, 1] for j in range(2)])
        assert found == pytest.approx(expected, rel=1e-12)
