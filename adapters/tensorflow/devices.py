"""Where TensorFlow computes."""

from collections.abc import Iterator
from typing import TypeVar

import tensorflow as tf

from became_core import BecameError

__all__ = ["checked_device", "on_device"]

T = TypeVar("T")


def on_device(device: str, steps: Iterator[T]) -> Iterator[T]:
    """Let an iterator take its steps on a device, and whoever asks for them be where they were."""
    while True:
        with tf.device(device):
            found = next(steps, None)
        if found is None:
            return
        yield found


def checked_device(name: str) -> str:
    """Return TensorFlow's name of a device.

    Raises:
        BecameError: if there is none of that name.
    """
    kind, _, number = name.replace("cuda", "gpu").partition(":")  # one device option for all backends
    devices = tf.config.list_logical_devices(kind.upper())
    if not devices or not (number or "0").isdecimal() or int(number or 0) >= len(devices):
        raise BecameError(f"TensorFlow has no device '{name}' here; try cpu, or cuda on a machine with a GPU.")
    return str(devices[int(number or 0)].name)
