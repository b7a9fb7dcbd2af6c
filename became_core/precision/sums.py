"""Sums of precisions, and the multiple of the identity, which is what damping adds.

A sum is of one structure where that is exact; otherwise its terms stand side by side in a ``Sum``. What is linear in a
precision (Gram matrices, products, the diagonal) a sum always has. It has an inverse where its terms share no
parameter, because they are blocks then: Kronecker factors for weights and a diagonal for biases, say.

Convention: as in ``base.py``.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from became_core.arrays import Array, Params, device, namespace, pytree, static
from became_core.errors import BecameError
from became_core.precision.base import Precision
from became_core.precision.vectors import (
    Rows,
    Shape,
    Shapes,
    added,
    amount_in,
    check_amount,
    check_positive,
    diagonal_matrix,
    embedded,
    flat,
    inner_products,
    parted,
    size,
    whole,
    wide,
)

__all__ = ["Isotropic", "Sum", "sum_of"]


@pytree
@dataclass(frozen=True)
class Isotropic(Precision):
    """A multiple of the identity for each parameter: weight decay, as a prior.

    Added to Kronecker factors it is their damping, so that the sum keeps its closed forms; a diagonal of equal values
    would not be known to be one.

    Attributes:
        amounts: 0-d arrays, at least 0, by parameter name.
        shapes: the parameters' shapes, of the same names.

    Raises:
        BecameError: if an amount is negative or not a number, or the names are not the same.

    Example:
        >>> import numpy as np
        >>> Isotropic.over({"w": np.zeros(2)}, 0.5).diagonal()["w"].tolist()
        [0.5, 0.5]
    """

    amounts: Params
    shapes: Mapping[str, Shape] = static()

    def __post_init__(self) -> None:
        """Check the amounts."""
        object.__setattr__(self, "shapes", Shapes.of(self.shapes))
        for name in self.amounts.keys() ^ self.shapes.keys():
            raise BecameError(f"'{name}' has an amount or a shape, but not both; give it both.")
        for name in self.shapes:
            check_amount(self.amounts[name], f"the precision of '{name}'")

    @classmethod
    def over(cls, parameters: Params, amount: Array | float) -> "Isotropic":
        """Return amount * identity over parameters, in their dtypes and on their devices."""
        check_amount(amount, "the precision")
        amounts = {}
        for name, value in parameters.items():
            zero = namespace(parameter=value).zeros((), dtype=value.dtype, device=device(value))
            amounts[name] = zero + amount_in(amount, zero)
        return cls(amounts, {name: tuple(value.shape) for name, value in parameters.items()})

    def covered(self) -> dict[str, Shape]:
        """Return the shapes."""
        return dict(self.shapes)

    def diagonal(self) -> Params:
        """Return each amount in its parameter's shape."""
        return {
            name: namespace(amount=self.amounts[name]).broadcast_to(self.amounts[name], shape)
            for name, shape in self.covered().items()
        }

    def inverse_diagonal(self) -> Params:
        """Return 1 / amount in each parameter's shape."""
        xp, dtype = self._common([], ())
        self._check_positive(self.amounts)
        variances = {name: 1.0 / wide(xp, amount, dtype) for name, amount in self.amounts.items()}
        return {name: xp.broadcast_to(variances[name], shape) for name, shape in self.covered().items()}

    def log_determinant(self) -> Array:
        """Return the sum of size * log(amount)."""
        xp, dtype = self._common([], ())
        self._check_positive(self.amounts)
        return sum(size(self.shapes[name]) * xp.log(wide(xp, amount, dtype)) for name, amount in self.amounts.items())

    def damped(self, amount: Array | float) -> "Isotropic":
        """Return the precision with more of the identity."""
        check_amount(amount, "the damping")
        return Isotropic({name: own + amount_in(amount, own) for name, own in self.amounts.items()}, self.shapes)

    def __mul__(self, factor: Array | float) -> "Isotropic":
        """Return the amounts times a number that is at least 0."""
        check_amount(factor, "a precision's factor")
        return Isotropic({name: own * amount_in(factor, own) for name, own in self.amounts.items()}, self.shapes)

    def _arrays(self) -> dict[str, Array]:
        return {f"the precision of '{name}'": value for name, value in self.amounts.items()}

    def _gram(self, left: Rows, right: Rows) -> Array:
        amounts = {name: wide(left.xp, amount, left.dtype) for name, amount in self.amounts.items()}
        return sum(inner_products(left.xp, left.of(name) * amounts[name], right.of(name)) for name in amounts)

    def _here(self, layouts: Mapping[str, Any]) -> "Isotropic":
        return Isotropic({name: whole("an amount", value) for name, value in self.amounts.items()}, self.shapes)

    def _times(self, vector: Params) -> Params:
        return {name: amount_in(self.amounts[name], u) * u for name, u in vector.items()}

    def _solved(self, vector: Params) -> Params:
        self._check_positive(vector)
        return {name: u / amount_in(self.amounts[name], u) for name, u in vector.items()}

    def _coloured(self, noise: Params) -> Params:
        self._check_positive(noise)
        return {name: u / namespace(u=u).sqrt(amount_in(self.amounts[name], u)) for name, u in noise.items()}

    def _matrix(self, xp: Any, dtype: Any) -> Array:
        entries = self.diagonal()
        return diagonal_matrix(xp, xp.concat([flat(xp, entries[name], dtype) for name in sorted(entries)]))

    def _combined(self, other: Precision) -> Precision | None:
        if not isinstance(other, Isotropic):
            return None
        return Isotropic(added(self.amounts, other.amounts), {**self.shapes, **other.shapes})

    def _split(self, names: Collection[str]) -> tuple[Precision, Precision]:
        (inside, outside), (its, others) = parted(self.amounts, names), parted(self.shapes, names)
        return Isotropic(inside, its), Isotropic(outside, others)

    def _check_positive(self, names: Iterable[str]) -> None:
        for name in names:
            check_positive(f"the precision of '{name}'", self.amounts[name])


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

    def _here(self, layouts: Mapping[str, Any]) -> "Sum":
        return Sum(tuple(term._here(layouts) for term in self.terms))

    def _terms(self) -> tuple[Precision, ...]:
        return self.terms

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

    def _restricted(self, names: Collection[str]) -> Precision:
        terms = tuple(term.restricted(names) for term in self.terms if not term.covered().keys().isdisjoint(names))
        return terms[0] if len(terms) == 1 else Sum(terms)

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
                "`Dense.of` for it, if the model is small."
            )
        return self.terms


def _part(term: Precision, vector: Params) -> Params:
    covered = term.covered()
    return {name: value for name, value in vector.items() if name in covered}


def sum_of(left: Precision, right: Precision) -> Precision:
    """Return the sum of two precisions, with as few terms as is exact."""
    others = right.covered()
    for name, shape in left.covered().items():
        other = others.get(name, shape)
        if shape != other and not (left._fits(name, other) or right._fits(name, shape)):
            raise BecameError(f"two precisions of '{name}' are for shapes {shape} and {other}; make them equal.")
    terms = left._terms()
    for term in right._terms():
        terms = _with(terms, term)
    return terms[0] if len(terms) == 1 else Sum(terms)


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
