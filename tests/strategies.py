"""Hypothesis strategies that several test modules share.

Values are multiples of 1/8 and small, so that sums of products are exact in float64: then an identity that holds on
paper holds to the bit, and a test needs no tolerance to hide behind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from became_core.laplace import Dense, Diagonal, Isotropic, Kronecker, LowRank, Precision
from reference.precisions import block_diagonal, kronecker_matrix, low_rank_matrix
from tests.backends import to_numpy, to_xp

__all__ = [
    "KINDS",
    "Segment",
    "Structured",
    "each_structure",
    "eighths",
    "few_if_compiled",
    "segments",
    "structured",
    "structured_pairs",
]

Array = NDArray[np.float64]
Tree = dict[str, Array]

Drawn = TypeVar("Drawn")
Shape = tuple[int, ...]


def few_if_compiled(all_values: st.SearchStrategy[Drawn], few: Sequence[Drawn]) -> st.SearchStrategy[Drawn]:
    """What decides on the shapes of arrays: all values, or a few where each operation is compiled for each new shape.

    There, compilation is most of what a test costs, and an operation that is right for one shape on one framework is
    right for all. NumPy's and PyTorch's sessions draw all values, and so does the long profile on every framework.
    """
    return st.deferred(
        lambda: st.sampled_from(few) if settings.get_current_profile_name() == "compiled" else all_values
    )


LEAF_SHAPES: st.SearchStrategy[list[Shape]] = few_if_compiled(
    st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (3, 1), (2, 1, 2)]), min_size=1, max_size=3),
    [[(), (3,)], [(2, 1, 2), (1,), (2, 3)]],
)


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
    shapes = draw(LEAF_SHAPES)
    names = [f"layer{index}.weight" for index in range(len(shapes))]

    def tree(low: int) -> Tree:
        return {name: draw(eighths(shape, low)) for name, shape in zip(names, shapes, strict=True)}

    return Segment(tree(-4), tree(-4), tree(0), tree(0), tree(-4), tree(-4))


@dataclass(frozen=True)
class Structured:
    """A precision in the core's terms, and as the matrix that it is by definition.

    ``kind`` is a class of ``became_core.laplace``, or "Blocks": Kronecker factors for one parameter, a diagonal for the
    others. ``parts`` holds the arrays that the kind is made of.
    """

    kind: str
    parts: Mapping[str, Any]
    shapes: dict[str, tuple[int, ...]]
    matrix: Array

    @property
    def size(self) -> int:
        return len(self.matrix)

    def on(self, xp: Any) -> Precision:
        """Return the precision, of a backend's arrays."""
        parts = to_xp(xp, self.parts)
        if self.kind == "Diagonal":
            return Diagonal(parts)
        if self.kind == "Isotropic":
            return Isotropic(parts, self.shapes)
        if self.kind == "Dense":
            return Dense(parts["matrix"], self.shapes)
        if self.kind == "LowRank":
            return LowRank(parts["factors"], parts["scales"], Diagonal(parts["diagonal"]))
        weights = {name: shape for name, shape in self.shapes.items() if name in parts["a"]}
        factors = {name: (parts["a"][name], parts["g"][name]) for name in weights}
        kronecker = Kronecker(factors, parts["damping"], weights)
        return kronecker + Diagonal(parts["diagonal"]) if self.kind == "Blocks" else kronecker

    def tree(self, vector: Array) -> Tree:
        """Return a vector [d] as parameters."""
        ends = np.cumsum([int(np.prod(self.shapes[name], dtype=int)) for name in sorted(self.shapes)])
        parts = np.split(vector, ends[:-1])
        return {name: part.reshape(self.shapes[name]) for name, part in zip(sorted(self.shapes), parts, strict=True)}

    def vector(self, tree: Mapping[str, Any]) -> Array:
        """Return a backend's parameters as a vector [d]."""
        return np.concatenate([to_numpy(tree[name]).ravel() for name in sorted(self.shapes)])


KINDS = ("Diagonal", "Isotropic", "Kronecker", "LowRank", "Dense", "Blocks")
PARAMETER_SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=3).filter(
    lambda shape: np.prod(shape) <= 9
)
# Where each is compiled, three of different numbers of dimensions, one with a single element.
PARAMETERS: st.SearchStrategy[list[Shape]] = few_if_compiled(
    st.lists(PARAMETER_SHAPES, min_size=1, max_size=3), [[(1,), (2, 3), (2, 1, 2)]]
)
RANKS = few_if_compiled(st.integers(1, 3), [2])
# So often that each of the six structures is drawn several times; with few shapes, more examples compile little more.
each_structure = settings(max_examples=max(25, settings().max_examples))


def parameter_shapes() -> st.SearchStrategy[dict[str, tuple[int, ...]]]:
    """One to three small parameters; their names are not in order."""
    return PARAMETERS.map(lambda shapes: dict(zip(("b.weight", "a.weight", "c"), shapes, strict=False)))


@st.composite
def structured_pairs(draw: st.DrawFn, *, definite: bool = False) -> tuple[Structured, Structured]:
    """Two precisions, each of some of the same parameters."""
    shapes = draw(parameter_shapes())
    names = list(shapes)
    some = few_if_compiled(st.lists(st.sampled_from(names), min_size=1, unique=True), [names, names[:1], names[1:]])
    left, right = ({name: shapes[name] for name in draw(some)} for _ in range(2))
    return draw(structured(shapes=left, definite=definite)), draw(structured(shapes=right, definite=definite))


@st.composite
def structured(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = KINDS,
    definite: bool = False,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> Structured:
    """Precisions of any structure over given parameters, or some; singular ones included unless ``definite``."""
    shapes = draw(parameter_shapes()) if shapes is None else shapes
    kind = draw(st.sampled_from(kinds))
    ground = 0.5 if definite else 0.0

    def values(of: Mapping[str, tuple[int, ...]], low: int = 0) -> Tree:
        return {name: draw(eighths(shape, low)) + (ground if low == 0 else 0) for name, shape in of.items()}

    def semidefinite(size: int) -> Array:
        root = draw(eighths((size, size)))
        return root @ root.T + ground * np.eye(size)

    def flat(tree: Tree) -> Array:
        return np.concatenate([tree[name].ravel() for name in sorted(tree)])

    size = sum(int(np.prod(shape)) for shape in shapes.values())
    if kind == "Diagonal":
        diagonal = values(shapes)
        return Structured(kind, diagonal, shapes, np.diag(flat(diagonal)))
    if kind == "Isotropic":
        amounts = values(dict.fromkeys(shapes, ()))
        full = {name: np.full(shape, amounts[name]) for name, shape in shapes.items()}
        return Structured(kind, amounts, shapes, np.diag(flat(full)))
    if kind == "Dense":
        matrix = semidefinite(size)
        return Structured(kind, {"matrix": matrix}, shapes, matrix)
    if kind == "LowRank":
        rank = draw(RANKS)
        factors = values({name: (*shape, rank) for name, shape in shapes.items()}, -4)
        if draw(st.booleans()):  # a parameter without a factor has zeros
            del factors[min(shapes)]
        scales, diagonal = draw(eighths((rank,), 0)), values(shapes)
        columns = {
            name: factors.get(name, np.zeros((*shape, rank))).reshape(-1, rank) for name, shape in shapes.items()
        }
        stacked = np.concatenate([columns[name] for name in sorted(shapes)])
        parts = {"factors": factors, "scales": scales, "diagonal": diagonal}
        return Structured(kind, parts, shapes, low_rank_matrix(stacked, scales, flat(diagonal)))
    weights = sorted(shapes)[:1] if kind == "Blocks" else sorted(shapes)
    a = {name: semidefinite(int(np.prod(shapes[name][1:], dtype=int))) for name in weights}
    g = {name: semidefinite(shapes[name][0]) for name in weights}
    damping = {name: draw(eighths((), 0)) for name in weights if draw(st.booleans())}
    diagonal = values({name: shape for name, shape in shapes.items() if name not in weights})
    blocks = [kronecker_matrix(a[name], g[name], float(damping.get(name, 0.0))) for name in weights]
    matrix = block_diagonal(*blocks, *(np.diag(diagonal[name].ravel()) for name in sorted(diagonal)))
    # "Blocks" without a second parameter has nothing for its diagonal.
    kind = kind if diagonal else "Kronecker"
    return Structured(kind, {"a": a, "g": g, "damping": damping, "diagonal": diagonal}, shapes, matrix)
