import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core.continual import metrics
from reference import metrics as reference

Matrix = NDArray[np.float64]


@st.composite
def matrices(draw: st.DrawFn, least: int = 2) -> Matrix:
    """Accuracy matrices, NaN above the diagonal."""
    tasks = draw(st.integers(least, 6))
    values = draw(st.lists(st.floats(0, 100), min_size=tasks * tasks, max_size=tasks * tasks))
    return np.where(np.tri(tasks, dtype=bool), np.reshape(values, (tasks, tasks)), np.nan)


@given(accuracy=matrices())
@pytest.mark.parametrize("name", ["average_accuracy", "backward_transfer", "forgetting", "plasticity"])
def test_a_metric_agrees_with_an_explicit_loop(name: str, accuracy: Matrix) -> None:
    expected = getattr(reference, name)(accuracy)
    assert getattr(metrics, name)(accuracy) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(accuracy=matrices())
def test_relations_between_metrics(accuracy: Matrix) -> None:
    tasks = len(accuracy)
    assert metrics.forgetting(accuracy) >= 0
    assert metrics.forgetting(accuracy) >= -metrics.backward_transfer(accuracy) - 1e-9
    gained = metrics.backward_transfer(accuracy) * (tasks - 1) / tasks
    assert metrics.average_accuracy(accuracy) == pytest.approx(metrics.plasticity(accuracy) + gained, abs=1e-9)


def test_metrics_of_a_matrix_computed_by_hand() -> None:
    accuracy = np.array([[90.0, np.nan, np.nan], [95.0, 80.0, np.nan], [85.0, 70.0, 60.0]])
    before = accuracy.copy()
    assert metrics.average_accuracy(accuracy) == pytest.approx((85 + 70 + 60) / 3)
    assert metrics.backward_transfer(accuracy) == pytest.approx((-5 - 10) / 2)
    assert metrics.forgetting(accuracy) == pytest.approx((10 + 10) / 2)
    assert metrics.plasticity(accuracy) == pytest.approx((90 + 80 + 60) / 3)
    np.testing.assert_array_equal(accuracy, before)


@given(accuracy=matrices(least=1).map(lambda matrix: matrix[:1, :1]))
def test_a_single_task_forgets_nothing(accuracy: Matrix) -> None:
    assert metrics.backward_transfer(accuracy) == metrics.forgetting(accuracy) == 0
    assert metrics.average_accuracy(accuracy) == metrics.plasticity(accuracy) == accuracy[0, 0]


def test_forward_transfer_is_the_mean_accuracy_on_tasks_not_yet_learned() -> None:
    accuracy = np.array([[90.0, 50.0, 20.0], [95.0, 80.0, 41.0], [85.0, 70.0, 60.0]])
    assert metrics.forward_transfer(accuracy) == pytest.approx((50 + 20 + 41) / 3)
    accuracy[0, 2] = np.nan
    assert metrics.forward_transfer(accuracy) is None
    assert metrics.forward_transfer(accuracy[:1, :1]) is None


@given(accuracy=matrices())
def test_forgetting_counts_what_was_known_before_a_task(accuracy: Matrix) -> None:
    """Where tasks ahead were scored, too, as with one head for all tasks."""
    scored = np.where(np.isnan(accuracy), 50.0, accuracy)
    assert metrics.forgetting(scored) == pytest.approx(reference.forgetting(scored), rel=1e-12, abs=1e-12)
    assert metrics.forgetting(scored) >= metrics.forgetting(accuracy)
