"""Precisions: symmetric positive semi-definite curvatures of a loss over all parameters, by structure.

Every precision answers the same question, the inner product u.P.v of two directions, and precisions add.
"""

from dataclasses import dataclass

from became_core.arrays import Array, Params, aligned_leaves, check_values, namespace
from became_core.errors import BecameError

__all__ = ["Diagonal"]


class Precision:
    """TEMP."""


def check_diagonal(label: str, values: Array) -> None:
    """Raise a BecameError that names the array if an entry is negative or not a number."""
    xp = namespace(values=values)
    # `not (x >= 0)` rather than `x < 0`: the comparison is false for a NaN too.
    check_values(
        xp.all(values >= 0), f"{label} has negative or NaN entries; a curvature's diagonal must be at least 0."
    )


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

    def gram(self, left, right=None):
        import array_api_compat
        right = left if right is None else right
        rows = [[self.inner(u, v) for v in right] for u in left]
        xp = namespace(a=rows[0][0])
        return xp.stack([xp.stack(r) for r in rows])
    def diagonal(self):
        return self.values
