"""Hypothesis strategies that several test modules share.

Values are multiples of 1/8 and small, so that sums of products are exact in float64: then an identity that holds on
paper holds to the bit, and a test needs no tolerance to hide behind.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

__all__ = ["Segment", "eighths", "segments"]

Array = NDArray[np.float64]
Tree = dict[str, Array]

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=3)


def eighths(shape: tuple[int, ...], low: int = -4) -> st.SearchStrategy[Array]:
    """Arrays [shape] of multiples of 1/8 in [low, 4), low -4 or 0, from one draw of bytes: fast, shrinks to zero."""
    size = int(np.prod(shape, dtype=int))
    kind, step = (np.int8, 4) if low < 0 else (np.uint8, 8)
    return st.binary(min_size=size, max_size=size).map(
        lambda drawn: np.asarray((np.frombuffer(drawn, kind).astype(int) // step) / 8).reshape(shape)
    )


@dataclass(frozen=True)
class Segment:
    """All that defines a Laplace cumulative loss between two models, as trees of one structure."""

    theta_gp: Tree
    theta_hat: Tree
    fisher_old: Tree
    fisher_new: Tree
    gradient: Tree
    mean: Tree

    def dense(self, *, full: bool = True) -> tuple[Array, Array, Array, Array, Array, Array]:
        """Return the oracle's arguments: vectors and dense matrices; without gradient and mean unless full."""
        gp, hat, old, new, gradient, mean = (
            _flat(tree)
            for tree in (self.theta_gp, self.theta_hat, self.fisher_old, self.fisher_new, self.gradient, self.mean)
        )
        if not full:
            gradient, mean = np.zeros_like(gp), gp
        return gp, hat, np.diag(old), np.diag(new), gradient, mean

    @property
    def curvature(self) -> float:
        """delta.(F_old + F_new).delta."""
        gp, hat, old, new, _, _ = self.dense()
        return float((hat - gp) @ (old + new) @ (hat - gp))


def _flat(tree: Tree) -> Array:
    return np.concatenate([tree[name].ravel() for name in sorted(tree)])


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    """Segments with one to three leaves of any small shape; degenerate ones included."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    names = [f"layer{index}.weight" for index in range(len(shapes))]

    def tree(low: int) -> Tree:
        return {name: draw(eighths(shape, low)) for name, shape in zip(names, shapes, strict=True)}

    return Segment(tree(-4), tree(-4), tree(0), tree(0), tree(-4), tree(-4))
