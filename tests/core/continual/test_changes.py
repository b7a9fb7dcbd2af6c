"""Detectors of changes, against the enumeration of all ways to cut a series, and on series whose changes are known."""

import math
from collections import Counter
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core import BecameError
from became_core.continual.changes import BayesianDetector, Detector, PlateauDetector, Reservoir, standardised
from reference.change_points import log_evidence_of_run, run_length_posterior

D = TypeVar("D", bound=Detector)
Numbers = NDArray[np.float64]

VALUES = st.lists(st.floats(-10, 10), min_size=1, max_size=8).map(np.array)


def observed(detector: D, values: Numbers) -> D:
    for value in values.tolist():
        detector = detector.observe(value)
    return detector


def alarms(detector: D, values: Numbers) -> list[tuple[int, int]]:
    """When each alarm came and where it says that the change was; the detector begins anew after each."""
    now, found = detector, []
    for place, value in enumerate(values.tolist()):
        now = now.observe(value)
        if now.changed:
            found.append((place, place - now.length + 1))
            now = detector
    return found


@given(VALUES, st.floats(0.001, 0.9))
def test_the_run_length_posterior_is_that_of_all_ways_to_cut_the_series(values: Numbers, hazard: float) -> None:
    detector = observed(BayesianDetector(hazard), values)
    expected, evidence = run_length_posterior(
        values, hazard, BayesianDetector.COUNT, BayesianDetector.FREEDOM, BayesianDetector.FREEDOM
    )
    probability = np.zeros(len(values))
    probability[detector.lengths - 1] = detector.probability
    np.testing.assert_allclose(probability, expected, rtol=1e-9, atol=1e-12)
    assert detector.log_evidence == pytest.approx(evidence, rel=1e-10, abs=1e-10)


def test_the_oracle_integrates_a_run_over_its_mean_and_precision() -> None:
    values, count, freedom, squares = np.array([0.3, -1.2, 2.0]), 0.5, 4.0, 3.0
    precisions, means = np.linspace(1e-4, 12, 1500)[:, None], np.linspace(-12, 12, 1500)[None, :]
    prior = (squares / 2) ** (freedom / 2) / math.gamma(freedom / 2) * precisions ** (freedom / 2 - 1)
    prior = prior * np.exp(-precisions * squares / 2)
    prior = prior * np.sqrt(count * precisions / (2 * np.pi)) * np.exp(-count * precisions * means**2 / 2)
    for value in values:
        prior = prior * np.sqrt(precisions / (2 * np.pi)) * np.exp(-precisions * (value - means) ** 2 / 2)
    whole = prior.sum() * (precisions[1, 0] - precisions[0, 0]) * (means[0, 1] - means[0, 0])
    assert log_evidence_of_run(values, count, freedom, squares) == pytest.approx(math.log(whole), abs=1e-3)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40).map(np.array))
def test_the_posterior_is_a_distribution_and_its_size_is_bounded(values: Numbers) -> None:
    detector = observed(BayesianDetector(hypotheses=7), values)
    assert len(detector.lengths) <= 7
    assert detector.probability.sum() == pytest.approx(1)
    assert len(set(detector.lengths.tolist())) == len(detector.lengths)
    assert detector.lengths.max() <= len(values)


def test_run_lengths_that_are_given_up_matter_little() -> None:
    values = np.random.default_rng(0).normal(size=400)
    values[250:] += 4
    whole, bounded = (observed(BayesianDetector(hypotheses=count), values) for count in (1000, 40))
    assert bounded.length == whole.length == 150
    assert bounded.risen(3) == pytest.approx(whole.risen(3), abs=1e-5)


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy-tailed"])
def test_stationary_noise_gives_no_alarm_in_fifty_tasks_of_a_hundred_batches(heavy: bool) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_t(3, 5_000) / math.sqrt(3) if heavy else rng.normal(size=5_000)
    assert alarms(BayesianDetector(), np.clip(values, -10, 10)) == []


def test_plateaus_give_false_alarms_where_the_posterior_gives_none() -> None:
    values = np.random.default_rng(1).normal(size=2000)
    assert len(alarms(PlateauDetector(), values)) > 10
    assert alarms(BayesianDetector(), values) == []


@pytest.mark.parametrize("step", [4.0, 6.0, 10.0])
def test_a_step_is_found_within_a_few_batches_and_dated(step: float) -> None:
    delays, errors = [], []
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=160)
        values[100:] += step
        ((when, start), *others) = alarms(BayesianDetector(), np.clip(values, -10, 10))
        delays.append(when - 100 + 1)
        errors.append(abs(start - 100))
        assert when >= 100
        # After the alarm the detector begins anew, at a level that it does not know; so the first alarm is what counts.
        assert all(place > when for place, _ in others)
    assert max(delays) <= 10
    assert np.mean(delays) <= 5
    assert np.mean(errors) <= 0.5


def test_a_larger_step_is_found_no_later() -> None:
    delays = []
    for step in (3.0, 5.0, 9.0):
        values = np.random.default_rng(3).normal(size=200)
        values[100:] += step
        delays.append(alarms(BayesianDetector(), values)[0][0])
    assert delays == sorted(delays, reverse=True)


def test_a_gradual_change_is_found_before_it_is_over_or_soon_after() -> None:
    for seed in range(10):
        values = np.random.default_rng(seed).normal(size=200)
        values[100:] += np.minimum(np.arange(100) / 40, 1) * 8
        assert 103 <= alarms(BayesianDetector(), np.clip(values, -10, 10))[0][0] <= 150


def test_a_fall_is_no_change() -> None:
    values = np.random.default_rng(0).normal(size=120)
    values[60:] -= 8
    assert alarms(BayesianDetector(), values) == []


def test_an_outlier_is_suspected_and_forgiven() -> None:
    detector = observed(BayesianDetector(), np.random.default_rng(0).normal(size=50))
    assert not detector.suspects
    detector = detector.observe(9.0)
    assert detector.suspects
    assert not detector.changed
    detector = observed(detector, np.random.default_rng(1).normal(size=3))
    assert not detector.suspects
    assert not detector.changed


def test_a_higher_hazard_expects_changes_sooner() -> None:
    values = np.random.default_rng(0).normal(size=30)
    rare, frequent = (observed(BayesianDetector(hazard), values) for hazard in (0.001, 0.2))
    short = [detector.probability[detector.lengths <= 5].sum() for detector in (rare, frequent)]
    assert short[0] < short[1]


def test_a_plateau_comes_before_a_peak() -> None:
    rising = np.full(20, 9.0)
    assert alarms(PlateauDetector(), rising) == []
    detector = observed(PlateauDetector(), np.zeros(5))
    assert not detector.changed
    detector = observed(detector, np.array([3.0, 3.0]))
    assert detector.changed
    assert detector.length == 2


@given(st.floats(0.5, 3), st.floats(-5, 5))
def test_a_standardised_loss_does_not_depend_on_the_losses_unit(scale: float, shift: float) -> None:
    reference = [0.3, 0.9, 0.4, 1.1]
    moved = [scale * loss + shift for loss in reference]
    assert standardised(scale * 1.5 + shift, moved) == pytest.approx(standardised(1.5, reference), rel=1e-6)


def test_losses_that_are_all_alike_are_no_reference_for_a_division_by_zero() -> None:
    assert standardised(1.0, [1.0, 1.0, 1.0]) == 0
    assert standardised(2.0, [1.0, 1.0, 1.0]) == 10


def test_every_batch_has_the_same_chance_to_be_in_the_reservoir() -> None:
    counts: Counter[int] = Counter()
    for seed in range(1500):
        reservoir = Reservoir(3, seed)
        for batch in range(10):
            reservoir = reservoir.offer(batch)
        assert len(set(reservoir.batches)) == 3
        counts.update(reservoir.batches)
    assert all(abs(counts[batch] - 450) < 4.5 * math.sqrt(450 * 0.7) for batch in range(10))


def test_a_reservoir_is_a_function_of_its_seed_and_key() -> None:
    def drawn(seed: int, key: int) -> tuple[int, ...]:
        reservoir = Reservoir(4, seed, key)
        for batch in range(60):
            reservoir = reservoir.offer(batch)
        return tuple(reservoir.batches)

    assert drawn(0, 0) == drawn(0, 0)
    assert len({drawn(seed, key) for seed in range(3) for key in range(3)}) == 9


@pytest.mark.parametrize("hazard", [0.0, 1.0, -0.1, math.nan])
def test_a_hazard_is_a_probability(hazard: float) -> None:
    with pytest.raises(BecameError, match=r"the hazard is .*between 0 and 1"):
        BayesianDetector(hazard)


def test_other_numbers_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(BecameError, match="the certainty is 1"):
        BayesianDetector(certainty=1.0)
    with pytest.raises(BecameError, match="the rise is 0"):
        BayesianDetector(rise=0.0)
    with pytest.raises(BecameError, match="confirmed by at least 1 batch"):
        BayesianDetector(confirmed=0)
    with pytest.raises(BecameError, match="at least 2 values"):
        PlateauDetector(window=1)
    with pytest.raises(BecameError, match="a reservoir of 0 batches holds nothing"):
        Reservoir(0)
    with pytest.raises(BecameError, match="give at least 2"):
        standardised(1.0, [1.0])
    with pytest.raises(BecameError, match="not finite"):
        standardised(math.nan, [1.0, 2.0])
    with pytest.raises(BecameError, match="must be finite"):
        BayesianDetector().observe(math.inf)
