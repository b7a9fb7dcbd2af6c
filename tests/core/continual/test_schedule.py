import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.continual import SGD, Adam, Annealed, Patience, Schedule, Stepped


def all_rates(schedule: Schedule, steps: int) -> list[float]:
    rates: list[float] = []
    while not schedule.finished:
        rates.extend(schedule.rates(steps).tolist())
        schedule = schedule.advance(math.nan)
    return rates


@given(epochs=st.integers(1, 5), steps=st.integers(2, 7), final=st.sampled_from([0.0, 0.01]))
def test_annealing_goes_from_lr_to_the_final_rate_at_the_last_step(epochs: int, steps: int, final: float) -> None:
    rates = all_rates(Annealed(0.5, epochs, final), steps)
    assert len(rates) == epochs * steps
    assert rates[0] == 0.5
    assert rates[-1] == pytest.approx(final, abs=1e-15)
    assert all(later < earlier for earlier, later in pairwise(rates))


@given(epochs=st.integers(2, 5), steps=st.integers(1, 7))
def test_annealing_is_a_cosine(epochs: int, steps: int) -> None:
    rates = all_rates(Annealed(0.5, epochs, 0.1), steps)
    expected = [0.1 + 0.4 * (1 + math.cos(math.pi * i / (len(rates) - 1))) / 2 for i in range(len(rates))]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", [Annealed(0.5, 2, 0.1), Stepped(0.5, 4), Patience(0.5, minimum=0.1, epochs=9)])
def test_a_scaled_schedule_has_all_rates_multiplied(schedule: Schedule) -> None:
    assert schedule.scaled(1.0) == schedule
    assert all_rates(schedule.scaled(0.1), 3) == pytest.approx([0.1 * rate for rate in all_rates(schedule, 3)])


def test_the_rate_of_a_single_step_is_lr() -> None:
    assert all_rates(Annealed(0.5, 1), 1) == [0.5]


def test_extended_annealing_is_one_cosine_over_both() -> None:
    assert all_rates(Annealed(0.5, 2).extended(3), 4) == all_rates(Annealed(0.5, 5), 4)


def test_a_schedule_does_not_change_when_it_advances() -> None:
    schedule = Annealed(0.5, 2)
    schedule.advance(1.0)
    schedule.extended(1)
    assert schedule == Annealed(0.5, 2)


@pytest.mark.parametrize("arguments", [(0.1, 0), (0.0, 3), (-0.1, 3)])
def test_annealing_with_settings_out_of_range_is_refused(arguments: tuple[float, int]) -> None:
    with pytest.raises(BecameError, match=r"^a stage has .* epochs at lr .*; give at least 1 and an lr above 0\.$"):
        Annealed(*arguments)


def test_patience_halves_the_rate_and_stops_as_computed_by_hand() -> None:
    """The rate is halved after two epochs without a better loss, and training stops below 0.2."""
    schedule = Patience(lr=1.0, factor=2.0, patience=2, minimum=0.2)
    rates = []
    for loss in [5.0, 4.0, 4.0, 4.1, 3.0, 3.5, 3.5, 3.5, 2.9, 2.9, 2.9]:
        assert not schedule.finished
        np.testing.assert_array_equal(schedule.rates(3), np.full(3, schedule.lr))
        schedule = schedule.advance(loss)
        rates.append(schedule.lr)
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.125]
    assert schedule.finished
    assert schedule.epoch == 11


def test_an_equal_loss_is_not_better() -> None:
    schedule: Patience = Patience(lr=1.0, patience=1).advance(2.0)
    assert schedule.advance(2.0).lr == 0.5


def test_a_loss_that_is_not_a_number_is_not_better() -> None:
    assert Patience(lr=1.0, patience=1).advance(math.nan).lr == 0.5


def test_patience_ends_at_its_last_epoch() -> None:
    schedule = Patience(lr=1.0, epochs=3)
    for loss in (3.0, 2.0, 1.0):
        assert not schedule.finished
        schedule = schedule.advance(loss)
    assert schedule.finished


def test_extending_patience_changes_nothing() -> None:
    schedule = Patience(lr=1.0)
    assert schedule.extended(10) is schedule


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": 0.0}, {"factor": 1.0}])
def test_patience_with_settings_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BecameError, match=r"^a patience schedule needs at least 1 epoch, an lr above 0 and a factor"):
        Patience(**({"lr": 1.0} | wrong))  # type: ignore[arg-type]


def test_stepped_rates_are_halved_at_epochs_30_and_60_of_80() -> None:
    rates = all_rates(Stepped(1e-4, 80), 2)
    assert rates == [1e-4] * 60 + [5e-5] * 60 + [2.5e-5] * 40


@given(epochs=st.integers(1, 20), more=st.integers(0, 20), steps=st.integers(1, 3))
def test_stepped_rates_are_divided_at_the_same_shares_of_any_number_of_epochs(
    epochs: int, more: int, steps: int
) -> None:
    schedule = Stepped(1.0, epochs, (0.25, 0.5), factor=10.0).extended(more)
    assert schedule == Stepped(1.0, epochs + more, (0.25, 0.5), factor=10.0)
    rates = np.reshape(all_rates(schedule, steps), (epochs + more, steps))
    for done, of_epoch in enumerate(rates / rates[0]):
        share = done / (epochs + more)
        assert of_epoch == pytest.approx(0.01 if share >= 0.5 else 0.1 if share >= 0.25 else 1.0)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": 0.0}, {"factor": 1.0}])
def test_stepped_rates_with_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BecameError, match=r"^a stepped schedule needs at least 1 epoch, an lr above 0 and a factor"):
        Stepped(**({"lr": 1.0, "epochs": 2} | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("milestones", [(30.0, 60.0), (0.0,), (0.5, math.nan)])
def test_a_milestone_outside_0_to_1_is_refused(milestones: tuple[float, ...]) -> None:
    with pytest.raises(BecameError, match="each is a share of the epochs"):
        Stepped(1.0, 80, milestones)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_rates_that_are_no_numbers_are_refused(number: float) -> None:
    schedules: list[Callable[[], object]] = [
        *(lambda: Annealed(number, 2), lambda: Annealed(0.1, 2, number), lambda: Patience(number)),
        *(lambda: Patience(0.1, factor=number), lambda: Patience(0.1, minimum=number), lambda: Stepped(number, 2)),
        *(lambda: Stepped(0.1, 2, factor=number), lambda: SGD(weight_decay=number), lambda: Adam(weight_decay=number)),
    ]
    for make in schedules:
        with pytest.raises(BecameError):
            make()


def test_a_share_that_is_a_number_of_epochs_is_reached_at_that_epoch() -> None:
    """7 / 25 of 25 epochs are 7.000000000000001 in floating point."""
    assert all_rates(Stepped(1.0, 25, (7 / 25,)), 1) == [1.0] * 7 + [0.5] * 18


def test_a_rate_that_begins_below_the_least_one_is_refused() -> None:
    """It would end before its first epoch; below the least rate a schedule gets by ``advance`` alone."""
    with pytest.raises(BecameError, match=r"the learning rate 1e-05 is below the least one, 5e-05, .* a larger lr"):
        Patience(lr=1e-5)
    assert Patience(lr=5e-5, patience=1).advance(1.0).advance(1.0).finished
