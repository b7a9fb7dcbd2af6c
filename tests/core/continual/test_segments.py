"""Streams without boundaries: what arrives when, where a stream is cut, what is known again, what is learned."""

from dataclasses import replace

import numpy as np
import pytest

from became_core import BecameError
from became_core.continual import (
    SGD,
    Annealed,
    BayesianDetector,
    Segment,
    Segments,
    TaskStream,
    Training,
    Watch,
    arrivals,
    build_method,
    check_watchable,
    find_segments,
    learn,
)
from reference.learner import ReferenceLearner
from tests.streams import prototype_stream

SIZE = 8
TRAINING = Training(Annealed(0.1, 2), Annealed(0.1, 1), SGD(), batch_size=SIZE)
WATCH = Watch(reservoir=8 * SIZE)


def one_head(tasks: int = 3, **settings: int) -> TaskStream:
    """Tasks of two classes each, whose samples are of one head's two classes."""
    stream = prototype_stream(tasks=tasks, classes_per_task=2, per_class=400, noise=15.0, validation=0.1, **settings)
    return replace(stream, shared_head=True)


def again(stream: TaskStream) -> TaskStream:
    """The stream with half of the first task's samples after all others."""
    first, *others = stream.tasks
    half = len(first.train) // 2
    early, late = replace(first, train=first.train[:half]), replace(first, train=first.train[half:])
    return replace(stream, tasks=(early, *others, replace(late, index=len(stream.tasks))))


def found_in(stream: TaskStream, watch: Watch = WATCH, seed: int = 0) -> Segments:
    return find_segments(ReferenceLearner(stream, seed=seed), stream, TRAINING, watch, seed)


@pytest.fixture(scope="module")
def found() -> Segments:
    return found_in(one_head())


def test_every_row_arrives_once_task_after_task_in_an_order_of_the_seed() -> None:
    stream = one_head()
    rows = arrivals(stream, 0)
    sizes = np.cumsum([len(task.train) for task in stream.tasks])[:-1]
    for task, part in zip(stream.tasks, np.split(rows, sizes), strict=True):
        np.testing.assert_array_equal(np.sort(part), np.sort(task.train))
    np.testing.assert_array_equal(rows, arrivals(stream, 0))
    assert not np.array_equal(rows, arrivals(stream, 1))


def test_a_gradual_change_mixes_two_tasks_around_the_boundary_alone() -> None:
    stream = one_head(2)
    size = len(stream.tasks[0].train)
    late = np.isin(arrivals(stream, 0, gradual=60), stream.tasks[1].train)
    assert not late[: size - 30].any()
    assert late[size + 30 :].all()
    assert late[size - 30 : size].mean() < 0.5 < late[size : size + 30].mean()
    assert late[size - 30 : size].any()


def test_a_stream_is_cut_where_its_tasks_change(found: Segments) -> None:
    assert found.false_alarms == 0
    assert len(found.segments) == 3
    assert all(delay is not None and delay <= 6 for delay in found.delays)
    starts = [segment.start for segment in found.segments[1:]]
    np.testing.assert_allclose(starts, found.changes, atol=2)


def test_segments_are_tasks_of_all_training_rows(found: Segments) -> None:
    stream = one_head()
    trained = np.concatenate([task.train for task in found.stream.tasks])
    np.testing.assert_array_equal(np.sort(trained), np.sort(np.concatenate([task.train for task in stream.tasks])))
    for part in ("test", "validation"):
        rows = np.concatenate([getattr(task, part) for task in found.stream.tasks])
        np.testing.assert_array_equal(np.sort(rows), np.sort(np.concatenate([getattr(t, part) for t in stream.tasks])))
    for task, true in zip(found.stream.tasks, stream.tasks, strict=True):
        assert np.isin(task.test, true.test).mean() > 0.95
        assert np.isin(task.train, true.train).mean() > 0.95


def test_memory_is_of_a_bounded_reservoir_of_the_segment(found: Segments) -> None:
    for task in found.stream.tasks:
        assert task.reservoir is not None
        assert len(task.reservoir) == WATCH.reservoir
        assert np.isin(task.reservoir, task.train).all()
        np.testing.assert_array_equal(task.measured, task.reservoir)


def test_segments_are_a_function_of_the_seed(found: Segments) -> None:
    repeated, other = found_in(one_head()), found_in(one_head(), seed=1)
    assert repeated.segments == found.segments
    for first, second in zip(repeated.stream.tasks, found.stream.tasks, strict=True):
        np.testing.assert_array_equal(first.measured, second.measured)
    assert not np.array_equal(other.stream.tasks[0].measured, found.stream.tasks[0].measured)


def test_one_task_gives_one_segment() -> None:
    found = found_in(one_head(1))
    assert [segment.announced for segment in found.segments] == [None]
    assert (found.delays, found.false_alarms) == ([], 0)


def test_a_domain_that_comes_again_is_known_and_not_learned_again() -> None:
    stream = again(one_head())
    found = found_in(stream)
    assert [segment.known for segment in found.segments] == [None, None, None, 0]
    assert len(found.stream.tasks) == 3
    trained = np.concatenate([task.train for task in found.stream.tasks])
    assert np.isin(stream.tasks[3].train, trained).mean() < 0.1
    # It is scored with the segment that it is known from.
    assert len(found.stream.tasks[0].test) > 0.9 * len(stream.tasks[0].test)


def test_a_gradual_change_is_found() -> None:
    found = found_in(one_head(2), replace(WATCH, gradual=80))
    assert len(found.segments) == 2
    assert found.delays[0] is not None
    assert found.delays[0] <= 80 // SIZE + 5


def test_a_rare_hazard_waits_longer_for_evidence() -> None:
    found = found_in(one_head(2), replace(WATCH, detector=BayesianDetector(hazard=1e-12)))
    usual = found_in(one_head(2))
    assert found.delays[0] is not None
    assert usual.delays[0] is not None
    assert found.delays[0] >= usual.delays[0]


def test_delays_and_false_alarms_are_counted_from_the_true_changes() -> None:
    segments = (Segment(0, 5), Segment(5, 10, 6), Segment(10, 20, 12), Segment(20, 22, 21), Segment(22, 40, 23))
    counted = Segments(one_head(), segments, (10, 20, 30))
    assert counted.delays == [3, 2, None]
    assert counted.false_alarms == 2


def test_the_loop_learns_segments_as_tasks(found: Segments) -> None:
    # The reference has a head for each task, so that this is of the memory alone.
    stream = replace(found.stream, shared_head=False)
    method = build_method("became+gpm")
    record = learn(ReferenceLearner(stream), stream, method, TRAINING)
    whole = replace(stream, tasks=tuple(replace(task, reservoir=None) for task in stream.tasks))
    other = learn(ReferenceLearner(whole), whole, method, TRAINING)
    assert record.accuracy.shape == (3, 3)
    assert record.accuracy[0, 0] == other.accuracy[0, 0]  # the memory comes after the first task
    assert record.alpha != other.alpha


def test_tasks_with_heads_of_their_own_are_refused_by_name() -> None:
    stream = replace(one_head(), shared_head=False)
    with pytest.raises(BecameError, match=r"^prototypes has a head for each task, and without boundaries"):
        check_watchable(ReferenceLearner(stream), stream, TRAINING, WATCH)


def test_a_stream_shorter_than_the_warm_up_is_refused() -> None:
    stream = one_head(1)
    with pytest.raises(BecameError, match=r"has 67 batches, and the first 70 fill the reservoir"):
        found_in(stream, Watch(reservoir=70 * SIZE))


def test_networks_with_running_statistics_are_refused() -> None:
    stream = one_head()
    learner = ReferenceLearner(stream)
    learner.running_statistics = frozenset({"bn.running_mean"})
    with pytest.raises(BecameError, match="running statistics"):
        check_watchable(learner, stream, TRAINING, WATCH)


def test_reservoirs_that_hold_too_little_are_refused() -> None:
    with pytest.raises(BecameError, match="a reservoir of 0 samples holds nothing"):
        Watch(reservoir=0)
    with pytest.raises(BecameError, match="tasks change over -1 samples"):
        Watch(gradual=-1)
    with pytest.raises(BecameError, match=r"a reservoir of 20 samples holds 2 batches of 8; let it hold at least 64"):
        found_in(one_head(), Watch(reservoir=20))


def test_a_reservoir_of_other_rows_is_refused() -> None:
    stream = one_head()
    wrong = replace(stream.tasks[0], reservoir=stream.tasks[1].train)
    with pytest.raises(BecameError, match="task 1 of prototypes has a reservoir of other rows"):
        replace(stream, tasks=(wrong, *stream.tasks[1:]))
