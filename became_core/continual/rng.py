"""Random numbers: a generator is a function of what it is used for, so a run has no state of generators to save.

Convention: a generator belongs to the seed of the run, a purpose, and the numbers of the task, stage and epoch, as far
as the purpose has them.
"""

import zlib

import numpy as np

__all__ = ["random_generator"]


def random_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return the NumPy generator of one purpose.

    Generators of equal arguments draw equal numbers; generators of different arguments are independent.

    Args:
        seed: of the run.
        purpose: what the numbers are for, such as "batches".
        indices: the numbers of the task, stage and epoch, as far as the purpose has them.

    Examples:
        >>> first, second = random_generator(0, "batches", 1), random_generator(0, "batches", 1)
        >>> bool(first.integers(100) == second.integers(100))
        True
    """
    # The purpose enters by its CRC-32 because ``hash`` differs from process to process. The number of indices enters
    # because NumPy pads seeds with zeros, so that the indices (1,) and (1, 0) would give the same generator.
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), len(indices), *indices])
