"""Statistics over seeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.analysis.bootstrap import Estimate, paired_difference
from became_core import BecameError

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@given(values=VALUES)
def test_an_estimate_is_mean_and_deviation_and_an_interval_around_the_mean(values: list[float]) -> None:
    result = Estimate(tuple(values))
    assert result.count == len(values)
    assert result.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert result.deviation == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    assert result.interval is not None
    low, high = result.interval
    slack = 1e-9
    assert min(values) - slack <= low <= result.mean + slack
    assert result.mean - slack <= high <= max(values) + slack


@given(values=VALUES, shift=st.floats(-10, 10), scale=st.floats(0.1, 10))
def test_an_interval_moves_and_scales_with_the_values(values: list[float], shift: float, scale: float) -> None:
    result, moved = Estimate(tuple(values)), Estimate(tuple(scale * value + shift for value in values))
    assert result.interval is not None
    assert moved.interval == pytest.approx([scale * end + shift for end in result.interval], abs=1e-6)
    assert Estimate(tuple(values)).interval == result.interval  # the draws are named, not taken from a state


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    """Of twenty values a percentile bootstrap is a little too narrow for its 95 %, and not by much."""
    draw = np.random.default_rng(0)
    intervals = [Estimate(tuple(draw.normal(size=20).tolist())).interval for _ in range(300)]
    covered = np.mean([interval is not None and interval[0] <= 0 <= interval[1] for interval in intervals])
    assert 0.88 < covered < 0.97


def test_of_one_there_is_no_interval_and_of_none_no_mean() -> None:
    one = Estimate((3.0,))
    assert (one.mean, one.count, one.deviation, one.interval) == (3.0, 1, None, None)
    with pytest.raises(BecameError, match="no runs to take a mean of"):
        Estimate(())


def test_differences_are_paired_by_seed() -> None:
    """What all runs of a seed share cancels: the interval is far narrower than of the two means apart."""
    seeds = {seed: 10.0 * seed for seed in range(5)}
    better = {seed: value + 1 + 0.01 * (seed % 2) for seed, value in seeds.items()}
    result = paired_difference(better, seeds)
    assert result is not None
    assert result.interval is not None
    assert (result.count, round(result.mean, 3)) == (5, 1.004)
    assert 1.0 <= result.interval[0] <= result.interval[1] <= 1.0101
    assert paired_difference({1: 5.0, 2: 7.0}, {2: 6.0, 3: 1.0}) == Estimate((1.0,))
    assert paired_difference({1: 5.0}, {2: 6.0}) is None


def test_an_estimate_is_shown_with_its_deviation_or_its_interval_if_there_are_several_runs() -> None:
    several, one = Estimate((1.0, 2.0)), Estimate((1.25,))
    assert (several.text(1), several.text(1, interval=True)) == ("1.5 ± 0.7", "1.5 [1.0, 2.0]")
    assert (one.text(1), one.text(2, interval=True)) == ("1.2", "1.25")
