"""Augmentation: random crops and flips of training images, drawn here so that every backend trains on the same ones.

Convention: an image is padded with black (zeros, before it is normalised) and cropped to its size again, then flipped
left to right or not, as torchvision's ``RandomCrop`` and ``RandomHorizontalFlip`` do. Evaluation, curvature and memory
see images as they are.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from became_core.arrays import Array, device, namespace
from became_core.errors import BecameError

__all__ = ["Augmentation", "Views"]


class Views(NamedTuple):
    """How each image of a batch is seen.

    Attributes:
        offsets: integers [N, 2]: how far down and to the right of the image's corner the crop's corner is.
        flips: booleans [N]: whether the crop is then flipped left to right.
    """

    offsets: Array
    flips: Array

    def shown(self, images: Array, *, axis: int) -> Array:
        """Return images as they are seen; of any framework, and within what it compiles.

        Args:
            images: [N, …], heights and widths being two axes beside one another.
            axis: the one of heights: 2 of [N, C, H, W], 1 of [N, H, W, C].
        """
        xp: Any = namespace(images=images)
        offsets = xp.asarray(self.offsets, device=device(images))
        flips = xp.asarray(self.flips, device=device(images))
        height, width = (
            xp.arange(images.shape[each], dtype=offsets.dtype, device=device(images)) for each in (axis, axis + 1)
        )
        mirrored = xp.where(flips[:, None], xp.flip(width)[None, :], width[None, :])
        seen = _taken(images, height[None, :] + offsets[:, :1], axis)
        return _taken(seen, mirrored + offsets[:, 1:], axis + 1)


def _taken(images: Array, places: Array, axis: int) -> Array:
    """Return what lies at places [N, size] along an axis of each image, black where that is beyond the border."""
    xp: Any = namespace(images=images)
    others = [other for other in range(1, len(images.shape)) if other != axis]
    for other in others:  # [N, 1, …, size, …, 1]
        places = xp.expand_dims(places, axis=other)
    last = images.shape[axis] - 1
    found = xp.take_along_axis(images, xp.clip(places, 0, last), axis=axis)
    return xp.where((places >= 0) & (places <= last), found, xp.zeros_like(found))


@dataclass(frozen=True)
class Augmentation:
    """What views are drawn.

    Attributes:
        padding: how many black pixels are added at each side before a crop.
        flips: whether every other image, at random, is flipped.
    """

    padding: int = 4
    flips: bool = True

    def __post_init__(self) -> None:
        """Check the padding."""
        if self.padding < 0:
            raise BecameError(f"the augmentation's padding is {self.padding} pixels; it must be at least 0.")

    def draw(self, count: int, stream: np.random.Generator) -> Views:
        """Return the views of so many images."""
        offsets = stream.integers(-self.padding, self.padding, (count, 2), endpoint=True)
        flips = stream.integers(0, 2, count).astype(bool)
        return Views(offsets, flips & self.flips)
