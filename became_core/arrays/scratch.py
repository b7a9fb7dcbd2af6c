"""The arithmetic of factors of products: as operators do it, and in memory that is used again and again.

Where values exist, arrays are summed slab by slab, and every slab has temporaries. Fresh memory for each costs several
times what the arithmetic does, whenever the C library hands back to the kernel what is freed; so where a framework can
be told where to write, it is; where not, a result is let go only when the next slab's takes its place, so that the
memory is never all free at once.
"""

from typing import Any

from became_core.arrays.namespace import Array, Walk

__all__ = ["Arithmetic", "Scratch", "Workspace"]


class Arithmetic:
    """Differences and products of flat arrays of one length and dtype, as operators make them: for a trace."""

    def sub(self, left: Array, right: Array) -> Array:
        """Return left - right."""
        return left - right

    def mul(self, left: Array, right: Array) -> Array:
        """Return left * right."""
        return left * right

    def squared_difference(self, left: Array, right: Array) -> Array:
        """Return (left - right)^2."""
        difference = self.sub(left, right)
        return self.mul(difference, difference)


class Scratch(Arithmetic):
    """The same where values exist, for slabs; results are good until ``forget``."""

    def __init__(self, xp: Any, walk: Walk) -> None:
        """Begin with no memory, for slabs of a namespace's arrays that are walked so."""
        self._xp, self._writes = xp, walk.writes
        self._kernels: Any = walk.kernels
        self._buffers: list[Array] = []
        self._used = 0

    def sub(self, left: Array, right: Array) -> Array:
        """Return left - right."""
        if self._writes:
            return self._xp.subtract(left, right, out=self._buffer(left))
        return self._held(left - right)

    def mul(self, left: Array, right: Array) -> Array:
        """Return left * right."""
        if self._writes:
            return self._xp.multiply(left, right, out=self._buffer(left))
        return self._held(left * right)

    def squared_difference(self, left: Array, right: Array) -> Array:
        """Return (left - right)^2, in one pass where the framework knows how."""
        if self._kernels is None:
            return super().squared_difference(left, right)
        return self._kernels.squared_difference(left, right, self._buffer(left))

    def least(self, values: Array) -> Array:
        """Return the least element, 0-d."""
        return self._xp.min(values) if self._kernels is None else self._kernels.least(values)

    @property
    def accumulates(self) -> bool:
        """Whether a product can be added to a result, where it lies, in one pass."""
        return self._kernels is not None

    def accumulate(self, total: Array, left: Array, right: Array) -> None:
        """Add left * right to the first elements of an earlier result, if this ``accumulates``."""
        size = left.shape[0]
        self._kernels.add_product(total if total.shape[0] == size else total[:size], left, right)

    def forget(self) -> None:
        """Let the memory of all results so far be used for the next ones."""
        self._used = 0

    def _buffer(self, like: Array) -> Array:
        size = like.shape[0]
        there = self._buffers[self._used] if self._used < len(self._buffers) else None
        there = self._held(self._xp.empty_like(like) if there is None or there.shape[0] < size else there)
        return there if there.shape[0] == size else there[:size]

    def _held(self, result: Array) -> Array:
        self._buffers[self._used : self._used + 1] = [result]
        self._used += 1
        return result


class Workspace:
    """The memory of sums of products, for one leaf of a tree after another; kept while leaves are walked alike.

    Attributes:
        factors: what the products' factors are computed in.
        sums: what the products are added up in.
    """

    factors: Scratch
    sums: Scratch

    def __init__(self) -> None:
        """Begin with no memory."""
        self._served: tuple[Any, Walk] | None = None

    def serve(self, xp: Any, walk: Walk) -> None:
        """Serve a namespace's arrays that are walked so, from now on."""
        if self._served != (xp, walk):  # then results may be of other dtypes, or elsewhere
            self._served = xp, walk
            self.factors, self.sums = Scratch(xp, walk), Scratch(xp, walk)
