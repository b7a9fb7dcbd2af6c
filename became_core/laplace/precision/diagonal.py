"""The simplest precisions: a number for each parameter's entry, or one for all of a parameter's entries.

Convention: the unit of a curvature, a mean or a sum over samples, is its maker's.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from became_core.arrays import Array, Params, check_values, device, namespace, pytree, static
from became_core.errors import BecameError
from became_core.laplace.precision.base import Precision
from became_core.laplace.precision.vectors import (
    Rows,
    Shape,
    Shapes,
    added,
    amount_in,
    check_amount,
    check_diagonal,
    diagonal_matrix,
    flat,
    parted,
    wide,
)

__all__ = ["Diagonal", "Isotropic", "Precision"]


@pytree
@dataclass(frozen=True)
class Diagonal(Precision):
    """A diagonal precision, an array for each parameter.

    Attributes:
        values: at least 0, by parameter name, each of its parameter's shape.

    Raises:
        BecameError: if a value is negative or not a number; the message names the parameter.
    """

    values: Params

    def __post_init__(self) -> None:
        """Check the values."""
        for name, value in self.values.items():
            check_diagonal(f"the precision of '{name}'", value)

    def covered(self) -> dict[str, Shape]:
        """Return the shapes of the parameters that have values."""
        return {name: tuple(value.shape) for name, value in self.values.items()}

    def diagonal(self) -> Params:
        """Return the values."""
        return dict(self.values)

    def inverse_diagonal(self) -> Params:
        """Return 1 / values."""
        xp, dtype = self._common([], ())
        self._check_positive(self.values)
        return {name: 1.0 / wide(xp, value, dtype) for name, value in self.values.items()}

    def log_determinant(self) -> Array:
        """Return the sum of the logarithms of the values."""
        xp, dtype = self._common([], ())
        self._check_positive(self.values)
        return sum(xp.sum(xp.log(wide(xp, value, dtype))) for value in self.values.values())

    def damped(self, amount: Array | float) -> "Diagonal":
        """Return the values + amount."""
        check_amount(amount, "the damping")
        return Diagonal({name: value + amount_in(amount, value) for name, value in self.values.items()})

    def __mul__(self, factor: Array | float) -> "Diagonal":
        """Return the values times a number that is at least 0."""
        check_amount(factor, "a precision's factor")
        return Diagonal({name: value * amount_in(factor, value) for name, value in self.values.items()})

    def _arrays(self) -> dict[str, Array]:
        return {f"the precision of '{name}'": value for name, value in self.values.items()}

    def _gram(self, left: Rows, right: Rows) -> Array:
        xp = left.xp
        total = None
        for name, value in self.values.items():
            u, v = left.of(name), right.of(name)
            part = xp.matmul(u * flat(xp, value, left.dtype), xp.matrix_transpose(v))
            total = part if total is None else total + part
        return total

    def _times(self, vector: Params) -> Params:
        return {name: self._flat(name, u) * u for name, u in vector.items()}

    def _solved(self, vector: Params) -> Params:
        self._check_positive(vector)
        return {name: u / self._flat(name, u) for name, u in vector.items()}

    def _coloured(self, noise: Params) -> Params:
        self._check_positive(noise)
        return {name: u / namespace(u=u).sqrt(self._flat(name, u)) for name, u in noise.items()}

    def _matrix(self, xp: Any, dtype: Any) -> Array:
        return diagonal_matrix(xp, xp.concat([flat(xp, self.values[name], dtype) for name in sorted(self.values)]))

    def _combined(self, other: Precision) -> Precision | None:
        return Diagonal(added(self.values, other.diagonal())) if isinstance(other, Diagonal | Isotropic) else None

    def _split(self, names: Collection[str]) -> tuple[Precision, Precision]:
        inside, outside = parted(self.values, names)
        return Diagonal(inside), Diagonal(outside)

    def _flat(self, name: str, like: Array) -> Array:
        return flat(namespace(like=like), self.values[name], like.dtype)

    def _check_positive(self, names: Iterable[str]) -> None:
        for name in names:
            check_values(
                namespace(value=self.values[name]).all(self.values[name] > 0),
                f"the precision of '{name}' has zero entries and so no inverse; add a multiple of the identity with "
                "`damped`.",
            )


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
        return self._diagonal().inverse_diagonal()

    def log_determinant(self) -> Array:
        """Return the sum of size * log(amount)."""
        return self._diagonal().log_determinant()

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
        return self._diagonal()._gram(left, right)

    def _times(self, vector: Params) -> Params:
        return self._diagonal()._times(vector)

    def _solved(self, vector: Params) -> Params:
        return self._diagonal()._solved(vector)

    def _coloured(self, noise: Params) -> Params:
        return self._diagonal()._coloured(noise)

    def _matrix(self, xp: Any, dtype: Any) -> Array:
        return self._diagonal()._matrix(xp, dtype)

    def _combined(self, other: Precision) -> Precision | None:
        if not isinstance(other, Isotropic):
            return None
        return Isotropic(added(self.amounts, other.amounts), {**self.shapes, **other.shapes})

    def _split(self, names: Collection[str]) -> tuple[Precision, Precision]:
        (inside, outside), (its, others) = parted(self.amounts, names), parted(self.shapes, names)
        return Isotropic(inside, its), Isotropic(outside, others)

    def _diagonal(self) -> Diagonal:
        """The same as a diagonal; its arrays are views, where the framework has such."""
        return Diagonal(self.diagonal())
