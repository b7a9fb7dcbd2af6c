"""Gram matrices of several precisions at once, for arrays that processes or devices share too.

Every process sums over its own part of each parameter, and one reduction of all numbers makes the sums those of the
whole. A precision offers what that takes: its terms, each term's part in this process, the sums that are added over the
processes, and the matrix that is made of them.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from became_core.arrays import Array, Params, Reduce, Shared, namespace, reduction_dtype, shared_by_processes
from became_core.errors import BecameError
from became_core.precision.vectors import Rows, diagonal_gram, flat

if TYPE_CHECKING:
    from became_core.precision.base import Precision  # which is made of this module

__all__ = ["GramRequest", "gram_matrices"]


class GramRequest(NamedTuple):
    """A Gram matrix to be computed.

    Attributes:
        precision: P.
        left: K directions.
        right: K' directions; those on the left if None.
        diagonal: whether the diagonal of P takes P's place.
    """

    precision: "Precision"
    left: Sequence[Params]
    right: Sequence[Params] | None = None
    diagonal: bool = False


def gram_matrices(requests: Sequence[GramRequest], reduce: Reduce | None = None) -> list[Array]:
    """Return several Gram matrices, as ``Precision.gram`` returns each.

    Of arrays that processes share (PyTorch's ``DTensor``), every process sums over its own part, and there is one
    reduction for all matrices together. It is of K x K' numbers for each matrix, and r (K + K') more for a ``LowRank``
    of r columns. ``Kronecker`` and ``Dense`` couple entries that are in different processes, so that the directions
    themselves take part in the reduction, whole.

    Args:
        requests: at least one.
        reduce: how numbers are summed over all processes or devices, if the arrays are one's own parts, as within
            ``jax.shard_map``; structures that couple a parameter's entries cannot be summed so. Arrays that a framework
            distributes need none.

    Raises:
        BecameError: as ``Precision.gram`` does; if the arrays lie on two meshes of processes, or a structure couples
            entries and ``reduce`` is given.
    """
    sides = [each.precision._checked(each.left, each.right) for each in requests]
    directions = [each for request in requests for side in (request.left, request.right or ()) for each in side]
    shared = shared_by_processes([array for direction in directions for array in direction.values()])
    if shared is None and reduce is None:
        matrices = [
            diagonal_gram(each.precision.diagonal(), *pair) if each.diagonal else each.precision._gram(*pair)
            for each, pair in zip(requests, sides, strict=True)
        ]
    else:
        matrices = _reduced(requests, sides, shared, reduce)
    # Symmetric on paper, and then to the last bit.
    return [
        0.5 * (matrix + namespace(matrix=matrix).matrix_transpose(matrix)) if each.right is None else matrix
        for each, matrix in zip(requests, matrices, strict=True)
    ]


class _Part(NamedTuple):
    """What this process has of a term's Gram matrix.

    Attributes:
        sums: numbers to be added over the processes.
        matrix: (the added numbers, namespace, dtype) -> the Gram matrix.
    """

    sums: list[Array]
    matrix: Callable[[Sequence[Array], Any, Any], Array]


def _reduced(
    requests: Sequence[GramRequest], sides: Sequence[tuple[Rows, Rows]], shared: Shared | None, reduce: Reduce | None
) -> list[Array]:
    """Return the Gram matrices, not yet symmetric to the last bit, by one reduction of all numbers."""
    parts = [
        [_part(term, each.diagonal, *pair, shared) for term in each.precision._terms()]
        for each, pair in zip(requests, sides, strict=True)
    ]
    sums = [array for of_request in parts for part in of_request for array in part.sums]
    xp: Any = namespace(sums=sums[0])
    dtype = reduction_dtype(sides[0][0].xp, **{str(index): each for index, each in enumerate(sums)})
    numbers = xp.concat([flat(xp, array, dtype) for array in sums])
    numbers = numbers if shared is None else shared.total(numbers)
    numbers = numbers if reduce is None else reduce(numbers)
    ends = list(accumulate(math.prod(array.shape) for array in sums))
    pieces = zip([0, *ends], ends, sums, strict=False)
    totals = iter([xp.reshape(numbers[start:end], array.shape) for start, end, array in pieces])
    return [
        sum(part.matrix([next(totals) for _ in part.sums], xp, dtype) for part in of_request) for of_request in parts
    ]


def _part(term: "Precision", diagonal: bool, left: Rows, right: Rows, shared: Shared | None) -> _Part:
    """Return this process's part of one term. Where the caller has parts already, the term is one of parts."""
    if shared is None:
        if diagonal:
            return _Part([diagonal_gram(term.diagonal(), left, right)], _first)
        if term.couples:
            raise BecameError(
                f"a {type(term).__name__} precision couples entries of different parts, which no sum over the parts "
                "shows; take a Diagonal, Isotropic or LowRank one."
            )
        return _Part(term._sums(left, right), term._gram_of)
    rows = [left] if right is left else [left, right]
    layouts = {
        name: shared.layout([direction[name] for each in rows for direction in each.directions])
        for name in term.covered()
    }
    embeds = term.couples and not diagonal
    here = [
        Rows(
            [
                {name: cut.embedded(each[name]) if embeds else cut.share(each[name]) for name, cut in layouts.items()}
                for each in side.directions
            ],
            side.xp,
            side.dtype,
        )
        for side in rows
    ]
    if diagonal:
        return _Part([diagonal_gram(term._diagonal_here(layouts), here[0], here[-1])], _first)
    part = term._here(layouts)
    return _Part(part._sums(here[0], here[-1]), part._gram_of)


def _first(sums: Sequence[Array], xp: Any, dtype: Any) -> Array:  # noqa: ARG001 - the signature of ``_gram_of``
    return sums[0]
