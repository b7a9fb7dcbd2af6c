"""Precisions: symmetric positive semi-definite curvatures of a loss over its parameters, by structure.

Every precision P answers the same question, the Gram matrix D^T P D of directions; precisions add (``sums.py``) and
scale. A direction is ``Params``, a vector over all parameters; where an order is needed (``Dense``), parameters are
sorted by name, each flattened row by row.

Convention on coverage: a precision covers some parameters, and its curvature for all others is zero. A direction may
have more parameters than are covered; they add nothing. It must have all that are covered, with one exception: where P
is block-diagonal by parameter (Diagonal, Isotropic, Kronecker), ``apply``, ``solve`` and ``sample`` take any part of
them. What needs an inverse refuses a parameter that is not covered.

Convention on dtype: everything is computed in the promoted dtype of all arrays, and at least float32; ``Params`` come
back in the dtype of those given, Gram matrices and determinants in the dtype of the computation.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from became_core.arrays import Array, Params, Reduce, is_spread, namespace, reduction_dtype
from became_core.errors import BecameError
from became_core.precision.gram import GramRequest, gram_matrices
from became_core.precision.vectors import Rows, Shape, flat

__all__ = ["Precision"]


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

    def restricted(self, names: Collection[str]) -> "Precision":
        """Return P for directions along some parameters alone: its rows and columns of these, among those it covers.

        Args:
            names: of the parameters that are kept; those that it does not cover have no effect.

        Raises:
            BecameError: if it covers none of them.
        """
        covered = self.covered()
        kept = [name for name in covered if name in names]
        if not kept:
            raise BecameError(
                f"the precision covers {', '.join(covered) or 'no parameter'} alone, and none of the parameters that "
                "are kept; give one that covers some of them."
            )
        return self if len(kept) == len(covered) else self._restricted(kept)

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
        from became_core.precision.sums import sum_of  # here, because a sum is itself a precision

        return sum_of(self, other)

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

    def _restricted(self, names: Collection[str]) -> "Precision":
        """As ``restricted``, for some of the parameters that it covers, and not all."""
        split = self._split(names)
        if split is not None:
            return split[0]
        from became_core.precision.dense import Dense  # here, because it is itself a precision

        return Dense.of(self)._restricted(names)

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
