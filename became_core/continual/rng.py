"""Random streams: every draw is a function of what it is for, so a run has no generator state to save.

Convention: a stream is named by the run's seed, a purpose, and the indices (task, stage, epoch) it belongs to.
"""

import zlib

import numpy as np

__all__ = ["random_generator"]


def random_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return the NumPy generator of one purpose, e.g. ``random_generator(0, "batches", task, stage, epoch)``.

    Two calls with equal arguments draw equal numbers; any difference in them gives an independent stream.
    The purpose enters through its CRC-32, which, unlike ``hash``, is the same in every process.
    """
    # Their number too: a seed sequence pads with zeros, so (1,) and (1, 0) would else be one stream.
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), len(indices), *indices])
