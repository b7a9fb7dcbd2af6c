"""Dropout masks from a stream."""

import numpy as np
import pytest

from adapters.networks import Dropout, draw_mask, draw_masks


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_right_fraction_is_kept_and_the_scale_keeps_the_mean(p: float) -> None:
    layer = Dropout(p)
    mask = draw_mask((400, 501), layer.threshold, np.random.default_rng(0))
    assert mask.shape == (400, 501)
    assert abs(mask.mean() - (1 - p)) < 5e-3
    assert layer.scale == pytest.approx(1 / (1 - p), abs=1e-4)
    assert abs((mask * layer.scale).mean() - 1) < 1e-2


def test_masks_are_drawn_in_order_and_repeat_with_their_stream() -> None:
    masks = (((3, 5), 2**15), ((7,), 2**14))
    first, again, other = (draw_masks(masks, 4, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert [mask.shape for mask in first] == [(4, 3, 5), (4, 7)]
    assert all(np.array_equal(mask, same) for mask, same in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    stream = np.random.default_rng(0)
    np.testing.assert_array_equal(first[0], draw_mask((4, 3, 5), 2**15, stream))
    np.testing.assert_array_equal(first[1], draw_mask((4, 7), 2**14, stream))
