"""Precisions: symmetric positive semi-definite curvatures of a loss over its parameters, by structure.

Every precision P answers the same question, the Gram matrix D^T P D of directions; precisions add and scale. A
direction is ``Params``, a vector over all parameters; where an order is needed (``Dense``), parameters are sorted by
name, each flattened row by row.

A sum is of one structure where that is exact; otherwise its terms stand side by side in a ``Sum``. What is linear in a
precision (Gram matrices, products, the diagonal) a sum always has. It has an inverse where its terms share no
parameter, because they are blocks then: Kronecker factors for weights and a diagonal for biases, say. The multiple of
the identity is defined here, because to damp a sum is to add one.

Convention on coverage: a precision covers some parameters, and its curvature for all others is zero. A direction may
have more parameters than are covered; they add nothing. It must have all that are covered, with one exception: where P
is block-diagonal by parameter (Diagonal, Isotropic, Kronecker), ``apply``, ``solve`` and ``sample`` take any part of
them. What needs an inverse refuses a parameter that is not covered.

Convention on dtype: everything is computed in the promoted dtype of all arrays, and at least float32; ``Params`` come
back in the dtype of those given, Gram matrices and determinants in the dtype of the computation.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from became_core.arrays import (
    Array,
    Params,
    Reduce,
    device,
    is_spread,
    namespace,
    pytree,
    reduction_dtype,
    static,
)
from became_core.errors import BecameError
from became_core.precision.gram import GramRequest, gram_matrices
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

__all__ = ["Isotropic", "Precision", "Sum"]


class Precision(ABC):
    """What every structure offers. A structure fills in the abstract methods; the others are built on these."""

    couples: ClassVar[bool] = False
    """Whether the structure couples entries of one parameter, so that processes with different ones must exchange them.
    """

    @abstractmethod
    def covered(self) -> dict[str, Shape]:
        """Return the shapes of the parameters that it covers, by name."""

    def gram(
        self, left: Sequence[Params], right: Sequence[Params] | None = None, *, reduce: Reduce | None = None
    ) -> Array:
        """Return left^T P right, [K, K'], for K and K' directions; without ``right``, left^T P left, [K, K], symmetric.

        Args:
            left: K directions.
            right: K' directions.
            reduce: as for ``gram_matrices``.

        Raises:
            BecameError: if a direction lacks a parameter that is covered, or has it in another shape.
        """
        return gram_matrices([GramRequest(self, left, right)], reduce)[0]

    def inner(self, left: Params, right: Params) -> Array:
        """Return u.P.v, a 0-d array; raises as ``gram`` does."""
        return self.gram([left], [right])[0, 0]

    def apply(self, u: Params) -> Params:
        """Return P u, in u's structure; zero for parameters that are not covered.

        Raises:
            BecameError: if u lacks a parameter that is covered (block-diagonal ones take a part), or has another shape.
        """
        shapes = self.covered()
        product = self._mapped({name: value for name, value in u.items() if name in shapes}, self._times, "u")
        return {
            name: product[name] if name in shapes else namespace(u=value).zeros_like(value) for name, value in u.items()
        }

    def solve(self, u: Params) -> Params:
        """Return P^-1 u, in u's structure.

        Raises:
            BecameError: as ``apply`` does, and if P is singular, u has a parameter that is not covered, or the
                structure has no closed form.
        """
        return self._mapped(u, self._solved, "u")

    def sample(self, noise: Params) -> Params:
        """Return S noise, with a fixed linear map S such that S S^T = P^-1: standard normal noise gives N(0, P^-1).

        Args:
            noise: of the parameters' shapes; the result has its structure and dtype.

        Raises:
            BecameError: as ``solve`` does.
        """
        return self._mapped(noise, self._coloured, "noise")

    @abstractmethod
    def diagonal(self) -> Params:
        """Return the diagonal of P, for the parameters that are covered."""

    @abstractmethod
    def inverse_diagonal(self) -> Params:
        """Return the diagonal of P^-1, the marginal variances, in at least float32; raises as ``solve`` does."""

    @abstractmethod
    def log_determinant(self) -> Array:
        """Return log det P over the parameters that are covered, a 0-d array; raises as ``solve`` does."""

    @abstractmethod
    def damped(self, amount: Array | float) -> "Precision":
        """Return P + amount * identity over the parameters that are covered; the amount is at least 0."""

    @abstractmethod
    def __mul__(self, factor: Array | float) -> "Precision":
        """Return P times a number that is at least 0."""

    def __add__(self, other: "Precision") -> "Precision":
        """Return the sum, over all that either covers: of one structure where that is exact, otherwise a ``Sum``.

        Raises:
            BecameError: if the two have a parameter in different shapes.
        """
        return _sum_of(self, other)

    @abstractmethod
    def _arrays(self) -> dict[str, Array]:
        """All arrays, labelled for messages."""

    @abstractmethod
    def _gram(self, left: Rows, right: Rows) -> Array:
        """As ``gram``, for checked directions."""

    def _sums(self, left: Rows, right: Rows) -> list[Array]:
        """What ``_gram_of`` makes the Gram matrix of: sums over parameters, to which each process adds its own.

        Of a structure that couples a parameter's entries with one another, they are the directions themselves.
        """
        if not self.couples:
            return [self._gram(left, right)]
        return [rows.of(name) for rows in ((left,) if left is right else (left, right)) for name in self.covered()]

    def _gram_of(self, sums: Sequence[Array], xp: Any, dtype: Any) -> Array:
        """The Gram matrix, given the sums."""
        if not self.couples:
            return sums[0]
        names = list(self.covered())
        sides = [dict(zip(names, sums[start:], strict=False)) for start in range(0, len(sums), len(names))]
        rows = [
            Rows([{name: value[k] for name, value in side.items()} for k in range(side[names[0]].shape[0])], xp, dtype)
            for side in sides
        ]
        return self._gram(rows[0], rows[-1])

    def _checked(self, left: Sequence[Params], right: Sequence[Params] | None) -> tuple[Rows, Rows]:
        """Check directions; return them as rows, the same ones twice where there are none on the right."""
        sides = {"left": left} if right is None else {"left": left, "right": right}
        vectors = [(f"{side} direction {k}", u) for side, directions in sides.items() for k, u in enumerate(directions)]
        for side, directions in sides.items():
            if not directions:
                raise BecameError(f"there are no {side} directions; give at least one.")
        xp, dtype = self._common(vectors, self.covered())
        flattens = not is_spread(left[0][next(iter(self.covered()))])
        rows = Rows(left, xp, dtype, flattens)
        return rows, rows if right is None else Rows(right, xp, dtype, flattens)

    @abstractmethod
    def _here(self, layouts: Mapping[str, Any]) -> "Precision":
        """This process's part, given how each parameter is cut; whole where the structure couples entries."""

    def _diagonal_here(self, layouts: Mapping[str, Any]) -> Params:
        """This process's part of the diagonal, given how each parameter is cut."""
        return {name: layouts[name].part(value) for name, value in self.diagonal().items()}

    def _terms(self) -> "tuple[Precision, ...]":
        """The precisions, none of them a sum, that this one is the sum of."""
        return (self,)

    @abstractmethod
    def _times(self, vector: Params) -> Params:
        """P times a vector: like ``_solved`` and ``_coloured``, of flat and widened parts for covered parameters."""

    @abstractmethod
    def _solved(self, vector: Params) -> Params:
        """P^-1 times a vector."""

    @abstractmethod
    def _coloured(self, noise: Params) -> Params:
        """S times a vector, S S^T = P^-1."""

    @abstractmethod
    def _matrix(self, xp: Any, dtype: Any) -> Array:
        """P as a matrix, [d, d]."""

    def _combined(self, other: "Precision") -> "Precision | None":
        """The sum of the two, if it is of this structure; of two structures, either may know it."""
        return None

    def _split(self, names: Collection[str]) -> "tuple[Precision, Precision] | None":
        """The parts for these parameters and for the others, if P is block-diagonal by parameter."""
        return None

    def _joint(self) -> Iterable[str]:
        """Parameters that P couples with others, which a vector may therefore not lack."""
        return ()

    def _fits(self, name: str, shape: Shape) -> bool:
        """Whether a direction's part of this shape is one for this parameter."""
        return shape == self.covered()[name]

    def _mapped(self, u: Params, function: Any, label: str) -> Params:
        shapes = self.covered()
        for name in u:
            if name not in shapes:
                raise BecameError(
                    f"{label} has '{name}', which the precision does not cover, so that its curvature there is zero "
                    "and has no inverse; add a precision that covers it."
                )
        xp, dtype = self._common([(label, u)], self._joint())
        mapped = function({name: flat(xp, value, dtype) for name, value in u.items()})
        return {
            name: xp.astype(xp.reshape(mapped[name], value.shape), value.dtype, copy=False) for name, value in u.items()
        }

    def _common(self, vectors: Sequence[tuple[str, Params]], required: Iterable[str]) -> tuple[Any, Any]:
        """Check vectors against this precision; return the namespace and the dtype of the computation."""
        shapes, arrays = self.covered(), self._arrays()
        if not shapes:
            raise BecameError("the precision has no parameters; give at least one.")
        for label, vector in vectors:
            for name in required:
                if name not in vector:
                    raise BecameError(f"{label} lacks '{name}', which the precision covers; give all that it covers.")
            for name in shapes:
                if name in vector:
                    shape = tuple(vector[name].shape)
                    if shape != shapes[name] and not self._fits(name, shape):
                        raise BecameError(
                            f"{label} '{name}' has shape {shape} but the precision is for {shapes[name]}; "
                            "make them equal."
                        )
                    arrays[f"{label} '{name}'"] = vector[name]
        xp = namespace(**arrays)
        return xp, reduction_dtype(xp, **arrays)


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


def _sum_of(left: Precision, right: Precision) -> Precision:
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
