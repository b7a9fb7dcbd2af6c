"""Sums of precisions: of one structure where that is exact, otherwise side by side.

What is linear in a precision (Gram matrices, products, the diagonal) a sum always has. An inverse it has where its
terms share no parameter, being blocks then: Kronecker factors for weights and a diagonal for biases and scales, say.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from became_core.arrays import Array, Params, device, pytree
from became_core.errors import BecameError
from became_core.laplace.precision.base import Precision
from became_core.laplace.precision.diagonal import Isotropic
from became_core.laplace.precision.vectors import Rows, Shape, added, amount_in, check_amount, embedded, wide

__all__ = ["Sum", "add"]


def add(left: Precision, right: Precision) -> Precision:
    """Return the sum of two precisions, with as few terms as is exact.

    Raises:
        BecameError: if the two have a parameter in different shapes.
    """
    for name, shape in left.covered().items():
        other = right.covered().get(name, shape)
        if not (left._fits(name, other) or right._fits(name, shape)):
            raise BecameError(f"two precisions of '{name}' are for shapes {shape} and {other}; make them equal.")
    terms = _terms(left)
    for term in _terms(right):
        terms = _with(terms, term)
    return terms[0] if len(terms) == 1 else Sum(terms)


def _terms(precision: Precision) -> tuple[Precision, ...]:
    return precision.terms if isinstance(precision, Sum) else (precision,)


def _with(terms: tuple[Precision, ...], new: Precision) -> tuple[Precision, ...]:
    """The terms and one more, which is combined with the first that it can be, and the result with the rest."""
    for index, term in enumerate(terms):
        rest = terms[:index] + terms[index + 1 :]
        for one, other in ((term, new), (new, term)):
            for part, remainder in _parts(other, one):
                combined = one._combined(part)
                if combined is not None:
                    return _with(_with(rest, combined), remainder) if remainder else _with(rest, combined)
    return (*terms, new)


def _parts(precision: Precision, other: Precision) -> Iterable[tuple[Precision, Precision | None]]:
    """A precision whole, and then, if it can be parted, as what lies within another's parameters and the remainder."""
    yield precision, None
    within = precision.covered().keys() & other.covered().keys()
    if within and len(within) < len(precision.covered()):
        split = precision._split(within)
        if split is not None:
            yield split


@pytree
@dataclass(frozen=True)
class Sum(Precision):
    """A sum of precisions of different structure, as ``+`` makes it.

    Attributes:
        terms: at least one; each may cover parameters of its own.
    """

    terms: tuple[Precision, ...]

    def covered(self) -> dict[str, Shape]:
        """Return the shapes of all parameters that a term covers."""
        shapes: dict[str, Shape] = {}
        for term in self.terms:
            for name, shape in term.covered().items():
                # A Kronecker product knows a weight as a matrix; the others know the shape that it has.
                if name not in shapes or not term._fits(name, shapes[name]):
                    shapes[name] = shape
        return shapes

    def diagonal(self) -> Params:
        """Return the sum of the terms' diagonals."""
        xp, dtype = self._common([], ())
        shapes = self.covered()
        total: Params = {}
        for term in self.terms:
            parts = {name: xp.reshape(part, shapes[name]) for name, part in term.diagonal().items()}
            total = added(total, {name: wide(xp, part, dtype) for name, part in parts.items()})
        return total

    def inverse_diagonal(self) -> Params:
        """Return the marginal variances, if no two terms share a parameter."""
        return {name: value for term in self._blocks() for name, value in term.inverse_diagonal().items()}

    def log_determinant(self) -> Array:
        """Return the sum of the terms' log-determinants, if no two terms share a parameter."""
        xp, dtype = self._common([], ())
        return sum(wide(xp, term.log_determinant(), dtype) for term in self._blocks())

    def damped(self, amount: Array | float) -> Precision:
        """Return P + amount * identity: blocks are damped each, otherwise the identity joins the sum."""
        check_amount(amount, "the damping")
        if self._shared() is None:
            return Sum(tuple(term.damped(amount) for term in self.terms))
        xp, dtype = self._common([], ())
        zero = xp.zeros((), dtype=dtype, device=device(next(iter(self._arrays().values()))))
        amounts = dict.fromkeys(self.covered(), zero + amount_in(amount, zero))
        return self + Isotropic(amounts, self.covered())

    def __mul__(self, factor: Array | float) -> "Sum":
        """Return the sum of the terms times a number that is at least 0."""
        return Sum(tuple(term * factor for term in self.terms))

    def _arrays(self) -> dict[str, Array]:
        return {
            f"{label} (term {k})": array for k, term in enumerate(self.terms) for label, array in term._arrays().items()
        }

    def _gram(self, left: Rows, right: Rows) -> Array:
        return sum(term._gram(left, right) for term in self.terms)

    def _times(self, vector: Params) -> Params:
        total: Params = {}
        for term in self.terms:
            total = added(total, term._times(_part(term, vector)))
        return total

    def _solved(self, vector: Params) -> Params:
        return {n: value for term in self._blocks() for n, value in term._solved(_part(term, vector)).items()}

    def _coloured(self, noise: Params) -> Params:
        return {n: value for term in self._blocks() for n, value in term._coloured(_part(term, noise)).items()}

    def _matrix(self, xp: Any, dtype: Any) -> Array:
        total = self.covered()
        return sum(embedded(xp, term._matrix(xp, dtype), term.covered(), total) for term in self.terms)

    def _joint(self) -> Iterable[str]:
        return [name for term in self.terms for name in term._joint()]

    def _fits(self, name: str, shape: Shape) -> bool:
        return all(term._fits(name, shape) for term in self.terms if name in term.covered())

    def _shared(self) -> str | None:
        """A parameter that two terms cover, if there is one."""
        seen: set[str] = set()
        for term in self.terms:
            for name in term.covered():
                if name in seen:
                    return name
            seen |= term.covered().keys()
        return None

    def _blocks(self) -> tuple[Precision, ...]:
        shared = self._shared()
        if shared is not None:
            kinds = " + ".join(type(term).__name__ for term in self.terms)
            raise BecameError(
                f"the inverse of a sum, {kinds}, has no closed form where its terms share a parameter, '{shared}'; ask "
                "`to_dense()` for it, if the model is small."
            )
        return self.terms


def _part(term: Precision, vector: Params) -> Params:
    return {name: value for name, value in vector.items() if name in term.covered()}
