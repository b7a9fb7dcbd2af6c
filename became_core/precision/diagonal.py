"""The diagonal precision: a number for each entry of each parameter.

Convention: the unit of a curvature, a mean or a sum over samples, is its maker's.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from became_core.arrays import Array, Params, namespace, pytree
from became_core.precision.base import Precision
from became_core.precision.sums import Isotropic
from became_core.precision.vectors import (
    Rows,
    Shape,
    added,
    amount_in,
    check_amount,
    check_diagonals,
    check_positive,
    diagonal_gram,
    diagonal_matrix,
    flat,
    parted,
    wide,
)

__all__ = ["Diagonal"]


@pytree
@dataclass(frozen=True)
class Diagonal(Precision):
    """A diagonal precision, an array for each parameter.

    Attributes:
        values: at least 0, by parameter name, each of its parameter's shape.

    Raises:
        BecameError: if a value is negative or not a number; the message names the parameter.

    Example:
        >>> import numpy as np
        >>> vector = {"w": np.asarray([1.0, 2.0])}
        >>> float(Diagonal({"w": np.asarray([3.0, 1.0])}).inner(vector, vector))
        7.0
    """

    values: Params

    def __post_init__(self) -> None:
        """Check the values."""
        check_diagonals(self._arrays())

    @classmethod
    def _of_checked(cls, values: Params) -> "Diagonal":
        """The precision of values that follow from checked ones, so that they are not negative: without a check."""
        precision = object.__new__(cls)
        object.__setattr__(precision, "values", values)
        return precision

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
        return self._of_checked({name: value * amount_in(factor, value) for name, value in self.values.items()})

    def _arrays(self) -> dict[str, Array]:
        return {f"the precision of '{name}'": value for name, value in self.values.items()}

    def _gram(self, left: Rows, right: Rows) -> Array:
        return diagonal_gram(self.values, left, right)

    def _here(self, layouts: Mapping[str, Any]) -> "Diagonal":
        return self._of_checked({name: layouts[name].part(value) for name, value in self.values.items()})

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
        if isinstance(other, Isotropic):  # its numbers, where there is something to add them to, and not arrays of them
            others = {name: other.amounts[name] for name in self.values if name in other.amounts}
            others |= {name: value for name, value in other.diagonal().items() if name not in self.values}
            return self._of_checked(added(self.values, others))
        return self._of_checked(added(self.values, other.values)) if isinstance(other, Diagonal) else None

    def _split(self, names: Collection[str]) -> tuple[Precision, Precision]:
        inside, outside = parted(self.values, names)
        return Diagonal(inside), Diagonal(outside)

    def _flat(self, name: str, like: Array) -> Array:
        return flat(namespace(like=like), self.values[name], like.dtype)

    def _check_positive(self, names: Iterable[str]) -> None:
        for name in names:
            check_positive(f"the precision of '{name}'", self.values[name])
