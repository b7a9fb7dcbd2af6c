"""Tasks by domain, targets that are numbers, and a head that tasks share."""

import numpy as np
import pytest

from became_core import BecameError
from became_core.continual import Dataset, RunRecord, TaskEnd, build_method, check_method, split_domains
from became_core.curvature import Bernoulli, Categorical, Gaussian
from tests.streams import drifting_stream


def tiny(**changes: object) -> Dataset:
    table = np.arange(12, dtype=np.float32).reshape(6, 2, 1, 1)
    values: dict[str, object] = {
        "labels": np.array([[1.0], [3.0], [5.0], [7.0], [9.0], [11.0]]),
        "likelihood": Gaussian(noise=1.0),
        "domains": np.array([0, 1, 0, 1, 0, 1]),
    }
    return Dataset("tiny", table, train_size=4, mean=(5.0, 6.0), std=(3.0, 3.0), **(values | changes))  # type: ignore[arg-type]


def test_targets_are_standardised_by_the_training_rows() -> None:
    stream = split_domains(tiny(), validation=0.0)
    np.testing.assert_allclose(stream.targets[:4].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(stream.targets[:4].std(), 1)
    np.testing.assert_allclose(stream.targets * stream.target_scale + 4, tiny().labels)
    assert [task.train.tolist() for task in stream.tasks] == [[0, 2], [1, 3]]
    assert [task.test.tolist() for task in stream.tasks] == [[4], [5]]
    assert stream.shared_head


def test_labels_stay_as_they_are() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    stream = split_domains(tiny(labels=labels, likelihood=Categorical()), validation=0.0, shared_head=False)
    np.testing.assert_array_equal(stream.targets, labels)
    assert stream.target_scale == 1
    assert all(task.classes == (0, 1, 2) for task in stream.tasks)


def test_targets_that_are_probabilities_stay_as_they_are() -> None:
    """Of yes-or-no targets, too, the unit matters: standardised they would be no probabilities."""
    answers = np.array([[0.0], [1.0], [1.0], [1.0], [0.0], [1.0]])
    stream = split_domains(tiny(labels=answers, likelihood=Bernoulli()), validation=0.0)
    np.testing.assert_array_equal(stream.targets, answers)
    assert stream.target_scale == 1
    with pytest.raises(BecameError, match=r"tiny has pictures \(1, 2\), and 1 pixels of each"):
        tiny(labels=answers, likelihood=Bernoulli(), pictures=(1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": None}, "no domains"),
        ({"domains": np.array([0, 0, 0, 0, 0, 1])}, "task 2 of tiny has no train samples"),
        ({"labels": np.ones((6, 1))}, "all alike"),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BecameError, match=message):
        split_domains(tiny(**changes), validation=0.0)


def test_numbers_must_be_finite_and_one_row_each() -> None:
    for labels in (np.ones(6), np.full((6, 1), np.nan), np.ones((5, 1))):
        with pytest.raises(BecameError, match=r"give finite numbers \[N, outputs\]"):
            tiny(labels=labels)


@pytest.mark.parametrize("method", ["hat", "packnet", "trgp", "became+trgp"])
def test_methods_with_weights_of_a_tasks_own_need_a_head_of_its_own(method: str) -> None:
    stream = drifting_stream()
    with pytest.raises(BecameError, match="whose tasks share a head: a task works "):
        check_method(build_method(method), stream)
    check_method(build_method(method), drifting_stream(shared_head=False))


@pytest.mark.parametrize("method", ["ogd", "became-paper", "nscl"])
def test_methods_of_labels_are_refused_for_numbers(method: str) -> None:
    settings = {"norm_penalty": 1.0} if method == "nscl" else {}
    with pytest.raises(BecameError, match="targets are no labels"):
        check_method(build_method(method, settings), drifting_stream())


def test_the_record_turns_the_sign_of_losses_alone() -> None:
    numbers, labels = RunRecord.empty(1, "RMSE"), RunRecord.empty(1)
    end = TaskEnd(0, None, [50.0], [40.0], loss=[2.0])
    rest: dict[str, object] = {"curve": (), "ranks": {}, "memory": 0, "path": None}
    assert numbers.with_task(end, **rest).measured == -2.0  # type: ignore[arg-type]
    assert labels.with_task(end, **rest).measured == 50.0  # type: ignore[arg-type]
