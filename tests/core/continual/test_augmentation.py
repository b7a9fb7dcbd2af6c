"""Views against explicit crops of padded images, on any backend, and the distribution of what is drawn."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from became_core import BecameError
from became_core.continual import Augmentation, Views
from reference.learner import cropped
from tests.backends import to_numpy, to_xp


@given(
    count=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    far=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_views_are_padded_cropped_and_flipped_images(
    xp: Any, count: int, shape: tuple[int, int, int], far: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    images = draw.integers(1, 256, (count, *shape), dtype=np.uint8)  # nothing in them is black
    views = Views(draw.integers(-far, far + 1, (count, 2)), draw.integers(0, 2, count).astype(bool))
    expected = cropped(images, views)
    channels_first = views.apply(to_xp(xp, images), axis=2)
    channels_last = views.apply(to_xp(xp, np.moveaxis(images, 1, -1).copy()), axis=1)
    assert channels_first.dtype == xp.uint8
    np.testing.assert_array_equal(to_numpy(channels_first), expected)
    np.testing.assert_array_equal(to_numpy(channels_last), np.moveaxis(expected, 1, -1))


def test_one_view_computed_by_hand(xp: Any) -> None:
    image = np.array([[[[1, 2, 3], [4, 5, 6]]]], dtype=np.uint8)
    down_left = Views(np.array([[1, -1]]), np.array([False]))
    np.testing.assert_array_equal(to_numpy(down_left.apply(to_xp(xp, image), axis=2)), [[[[0, 4, 5], [0, 0, 0]]]])
    flipped = Views(np.array([[1, -1]]), np.array([True]))  # after the crop
    np.testing.assert_array_equal(to_numpy(flipped.apply(to_xp(xp, image), axis=2)), [[[[5, 4, 0], [0, 0, 0]]]])


def test_all_offsets_are_equally_likely_and_half_of_the_images_are_flipped() -> None:
    views = Augmentation(padding=2).draw(20_000, np.random.default_rng(0))
    for offsets in views.offsets.T:
        np.testing.assert_array_equal(np.unique(offsets), [-2, -1, 0, 1, 2])
        np.testing.assert_allclose(np.bincount(offsets + 2) / 20_000, 0.2, atol=0.015)
    assert np.mean(views.flips) == pytest.approx(0.5, abs=0.015)
    assert abs(np.corrcoef(views.offsets[:, 0], views.offsets[:, 1])[0, 1]) < 0.03


def test_without_flips_nothing_is_flipped_and_offsets_are_the_same() -> None:
    views, unflipped = (Augmentation(flips=flips).draw(50, np.random.default_rng(0)) for flips in (True, False))
    np.testing.assert_array_equal(views.offsets, unflipped.offsets)
    assert views.flips.any()
    assert not unflipped.flips.any()


def test_a_negative_padding_is_an_error() -> None:
    with pytest.raises(BecameError, match="padding is -1 pixels"):
        Augmentation(padding=-1)
