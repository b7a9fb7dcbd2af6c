"""What a process does of the work that several share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core.continual import Share


@given(count=st.integers(1, 9), parts=st.integers(0, 30))
def test_every_part_is_done_once_or_by_all(count: int, parts: int) -> None:
    numbers = list(range(parts))
    of_each = [list(Share(rank, count).own(numbers)) for rank in range(count)]
    if count > 1 and parts >= count:
        assert sorted(number for own in of_each for number in own) == numbers
        assert all(of_each)
    else:
        assert of_each == [numbers] * count


@given(count=st.integers(1, 9), samples=st.integers(1, 70))
def test_every_sample_of_a_batch_is_one_processs_or_all_have_it(count: int, samples: int) -> None:
    numbers = list(range(samples))
    of_each = [numbers[Share(rank, count).rows(samples)] for rank in range(count)]
    if count > 1 and samples >= count:
        assert [number for own in of_each for number in own] == numbers
        assert max(map(len, of_each)) - min(map(len, of_each)) <= 1
    else:
        assert of_each == [numbers] * count


@pytest.mark.parametrize(("count", "parts"), [(1, 5), (4, 3)])
def test_where_nothing_is_divided_nothing_is_exchanged(count: int, parts: int) -> None:
    assert Share(0, count).exchange(parts) is None
    assert Share(0, 2).exchange(parts) is not None
