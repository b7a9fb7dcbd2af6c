"""Losses known in the coordinates of a few vectors: all that a merge of models shared by processes needs to know.

Whatever an estimator asks of losses, it asks about the directions between models and about the ways from each loss's
own point to the first model. In the coordinates of these M vectors a posterior is a matrix [M, M] for its precision and
another for the diagonal of it. So all sums over weights, of all losses, take one reduction over the processes, and
estimators then work with vectors of M numbers, which every process has.

Convention: the coordinates of a point or direction are the ``Params`` {COORDINATES: [M]}; the first model is at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from became_core.arrays import Array, Params, Reduce, device, namespace
from became_core.laplace.estimators import LocalLoss, MergeSubspace
from became_core.laplace.posterior import LaplacePosterior, offset
from became_core.laplace.quadratic import Quadratic
from became_core.precision import Dense, GramRequest, gram_matrices

__all__ = ["restricted"]

COORDINATES = "coordinates"


@dataclass(frozen=True)
class _RestrictedPosterior(LaplacePosterior):
    """A posterior in coordinates.

    Attributes:
        approximation: the precision's diagonal in coordinates, where it is a matrix as well.
    """

    approximation: Dense

    def diagonal(self) -> Dense:  # type: ignore[override] # which answers what is asked of a diagonal
        return self.approximation


@dataclass(frozen=True)
class _RestrictedLoss:
    """A loss that measures what it is asked for, in coordinates.

    Attributes:
        mean: its point.
        measured: the loss, as a function of the weights.
        origin: the first model.
        vectors: the M vectors.
        reduce: as for ``restricted``.
    """

    mean: Params
    measured: LocalLoss
    origin: Params
    vectors: Sequence[Params]
    reduce: Reduce | None

    def diagonal(self) -> Dense:
        (matrix,) = gram_matrices([GramRequest(self.measured.diagonal(), self.vectors)], self.reduce)
        return _dense(matrix)

    def along(self, directions: Sequence[Params]) -> Quadratic:
        return self.measured.along([self._weights(direction) for direction in directions])

    def slope(self, origin: Params, directions: Sequence[Params]) -> Array:
        return self.measured.slope(self._point(origin), [self._weights(direction) for direction in directions])

    def loss(self, theta: Params) -> Array | float:
        return self.measured.loss(self._point(theta))

    def _point(self, coordinates: Params) -> Params:
        way = self._weights(coordinates)
        return {name: value + way[name] for name, value in self.origin.items()}

    def _weights(self, coordinates: Params) -> Params:
        numbers = coordinates[COORDINATES]
        return {
            name: sum(numbers[index] * vector[name] for index, vector in enumerate(self.vectors))
            for name in self.origin
        }


def restricted(
    subspace: MergeSubspace, losses: Sequence[LocalLoss], reduce: Reduce | None
) -> tuple[MergeSubspace, list[LocalLoss]]:
    """Return the space between models, and the losses, in coordinates; with one reduction for all posteriors together.

    A loss that is no posterior is asked with weights, when an estimator asks it.

    Args:
        subspace: K directions from the first model.
        losses: posteriors, or whatever measures a loss.
        reduce: as for ``gram_matrices``.
    """
    ways = [offset(subspace.origin, loss.mean) for loss in losses]
    vectors = [*subspace.directions, *ways]
    requests = []
    for loss in losses:
        if isinstance(loss, LaplacePosterior):
            requests += [GramRequest(loss.precision, vectors), GramRequest(loss.precision, vectors, diagonal=True)]
    matrices = iter(gram_matrices(requests, reduce) if requests else [])
    like = next(iter(subspace.origin.values()))
    xp = namespace(like=like)
    axes = xp.eye(len(vectors), dtype=like.dtype, device=device(like))
    count, in_coordinates = len(subspace.directions), list[Any]()  # what answers as a diagonal is a matrix
    for index, loss in enumerate(losses):
        mean = {COORDINATES: -axes[count + index, :]}
        if isinstance(loss, LaplacePosterior):
            exact, approximation = _dense(next(matrices)), _dense(next(matrices))
            in_coordinates.append(_RestrictedPosterior(mean, exact, approximation))
        else:
            in_coordinates.append(_RestrictedLoss(mean, loss, subspace.origin, vectors, reduce))
    directions = [{COORDINATES: axes[index, :]} for index in range(count)]
    return MergeSubspace({COORDINATES: axes[0, :] * 0}, directions, subspace.newest), in_coordinates


def _dense(matrix: Array) -> Dense:
    """Return a Gram matrix as a precision; rounding may have put a zero on its diagonal slightly below."""
    xp = namespace(matrix=matrix)
    diagonal = xp.eye(matrix.shape[0], dtype=matrix.dtype, device=device(matrix)) > 0
    return Dense(xp.where(diagonal & (matrix < 0), xp.zeros_like(matrix), matrix), {COORDINATES: (matrix.shape[0],)})
