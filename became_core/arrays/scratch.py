"""Differences and products in memory that is used again and again.

Where values exist, arrays are summed slab by slab, and every slab has temporaries. Fresh memory for each costs several
times what the arithmetic does, whenever the C library hands back to the kernel what is freed; so where a framework can
be told where to write, it is; where not, a result is let go only when the next slab's takes its place, so that the
memory is never all free at once.
"""

from collections.abc import Sequence

from became_core.arrays.namespace import Array, namespace, takes_out

__all__ = ["Scratch"]


class Scratch:
    """``sub`` and ``mul`` of the operator module, for slabs; results are good until ``forget``."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        """Begin with no memory, for slabs of these arrays, which share a namespace, and of results."""
        self._xp = namespace(first=arrays[0])
        self._writes = takes_out(arrays)
        self._buffers: list[Array] = []
        self._used = 0

    def sub(self, left: Array, right: Array) -> Array:
        """Return left - right, flat arrays of one length and dtype."""
        if self._writes:
            return self._xp.subtract(left, right, out=self._buffer(left))
        return self._held(left - right)

    def mul(self, left: Array, right: Array) -> Array:
        """Return left * right, likewise."""
        if self._writes:
            return self._xp.multiply(left, right, out=self._buffer(left))
        return self._held(left * right)

    def forget(self) -> None:
        """Let the memory of all results so far be used for the next ones."""
        self._used = 0

    def _buffer(self, like: Array) -> Array:
        size = like.shape[0]
        if self._used == len(self._buffers):
            self._buffers.append(self._xp.empty_like(like))
        elif self._buffers[self._used].shape[0] < size:
            self._buffers[self._used] = self._xp.empty_like(like)
        self._used += 1
        return self._buffers[self._used - 1][:size]

    def _held(self, result: Array) -> Array:
        self._buffers[self._used : self._used + 1] = [result]
        self._used += 1
        return result
