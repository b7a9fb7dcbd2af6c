"""Precisions: symmetric positive semi-definite curvatures of a loss over all parameters, by structure.

Every precision answers the same question, the inner product u.P.v of two directions, and precisions add.
"""

from dataclasses import dataclass

from became_core.arrays import Array, Params, aligned_leaves, namespace
from became_core.errors import BecameError
from became_core.laplace.quadratic import check_diagonal

__all__ = ["Diagonal"]


@dataclass(frozen=True)
class Diagonal:
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
            check_diagonal(namespace(**{name: value}), f"the precision of '{name}'", value)

    def __add__(self, other: "Diagonal") -> "Diagonal":
        """Return the sum; parameters that only one of the two covers keep its values."""
        total = dict(self.values)
        for name, value in other.values.items():
            total[name] = total[name] + value if name in total else value
        return Diagonal(total)

    def __mul__(self, factor: Array | float) -> "Diagonal":
        """Return the precision times a non-negative number."""
        return Diagonal({name: value * factor for name, value in self.values.items()})

    def apply(self, direction: Params) -> Params:
        """Return P u, in the direction's structure."""
        return {name: self.values[name] * value for name, value in direction.items()}

    def inner(self, left: Params, right: Params) -> Array:
        """Return u.P.v, a 0-d array.

        Raises:
            BecameError: if the directions do not match this precision's parameters.
        """
        total = None
        for leaf in aligned_leaves(precision=self.values, left=left, right=right):
            value, u, v = leaf.values()
            xp = namespace(**leaf)
            part = xp.sum(u * value * v)
            total = part if total is None else total + part
        if total is None:
            raise BecameError("the precision has no parameters; give at least one.")
        return total
