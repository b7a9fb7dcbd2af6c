"""The digest of a model's weights, by which a Fisher file knows its model.

It is made slab by slab while a merge reads, so that it costs no second reading, and it depends on names, dtypes, shapes
and bytes alone: the same weights have the same digest in one file, in shards and in a PyTorch file. A slab's print is a
multilinear hash of its 64-bit words, with fixed odd multipliers, modulo 2^64; the digest is a SHA-256 over all prints.
It tells models apart; it does not protect from somebody who builds two models to have the same digest.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.folders import Checkpoint
from adapters.checkpoints.tensors import SLAB, StoredTensor, ranges

__all__ = ["digest_of", "print_of"]


@cache
def _multipliers() -> NDArray[np.uint64]:
    generator = np.random.Generator(np.random.Philox(2502_04666))
    return generator.integers(0, 2**63, SLAB + 2, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def print_of(content: NDArray[np.uint8]) -> int:
    """Return the print of a slab's bytes.

    Example:
        >>> one, other = np.zeros(9, np.uint8), np.zeros(10, np.uint8)
        >>> print_of(one) == print_of(other)
        False
    """
    whole = len(content) // 8 * 8
    rest = content[whole:].tobytes().ljust(8, b"\0") + len(content).to_bytes(8, "little")
    multipliers = _multipliers()
    ends = np.dot(np.frombuffer(rest, np.uint64), multipliers[:2])
    words = content[:whole].view(np.uint64)  # at most one an element
    # einsum adds integers several at a time, and takes two thirds of the time of np.dot.
    return (int(ends) + int(np.einsum("i,i->", words, multipliers[2 : 2 + len(words)]))) % 2**64


def digest_of(checkpoint: Checkpoint, prints: Mapping[str, Sequence[int]] | None = None) -> str:
    """Return the digest of a model's weights, 32 hexadecimal digits.

    Args:
        checkpoint: the model.
        prints: the prints of those tensors that have been read already, slab by slab; the others are read.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        numbers = (prints or {}).get(name)
        if numbers is None:
            numbers = [tensor_print(tensor, start, stop) for start, stop in ranges(tensor.size)]
        axes = ",".join(map(str, tensor.shape))
        total.update(f"{len(name)}:{name} {tensor.dtype} [{axes}] ".encode())
        total.update(" ".join(f"{number:x}" for number in numbers).encode())
    return total.hexdigest()[:32]


def tensor_print(tensor: StoredTensor, start: int, stop: int) -> int:
    """Return the print of a slab of a tensor."""
    return print_of(tensor.slab(start, stop).view(np.uint8))
