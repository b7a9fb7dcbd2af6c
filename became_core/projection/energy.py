"""Where the energy of a task's Gram matrix lies: in directions that are kept already, and in new ones.

With R the inputs as columns, C = R R^T / n and M the kept basis, orthonormal [d, k], the residual R' = R - M M^T R has
left singular vectors u_i orthogonal to M. So they are those of N^T C N, N [d, d - k] being M's complement:
a smaller problem the fuller the memory, whose vectors need no orthogonalising. Left vectors and squared singular
values are all that is asked for, hence a Gram matrix, summed in one pass, is enough. Of fewer inputs than columns a
factor F [n, d] is given, C = F^T F, and the smaller matrix F' F'^T [n, n] has the same values.

Convention: energies are eigenvalues of C, which are mean squares; leading ones first; in float64 where there is one.
"""

from typing import Any, NamedTuple

from became_core.arrays import Array, check_values, device, namespace
from became_core.errors import BecameError

__all__ = ["Energies", "checked_gram", "complement", "energies", "min_directions", "rounding", "spectrum", "wide"]


class Energies(NamedTuple):
    """A Gram matrix beside a basis.

    Attributes:
        total: its trace, 0-d.
        floor: energies up to this are rounding, 0-d.
        old: the energy along each direction of the basis, [k].
        new: that along each new direction, descending, [d - k], or, from a factor, [n].
        directions: the new directions, orthonormal where their energy is above the floor, [d, as many].
        captured: the energy within the basis's span, 0-d.
    """

    total: Array
    floor: Array
    old: Array
    new: Array
    directions: Array
    captured: Array


def wide(array: Array) -> Array:
    """Return an array in float64, or in the widest that the framework has (JAX, unless told otherwise)."""
    xp: Any = namespace(array=array)
    return xp.astype(array, xp.result_type(xp.float64), copy=False)


def checked_gram(name: str, gram: Array, width: int | None) -> Array:
    """Return a Gram matrix [d, d] in float64, given itself or a factor of it.

    Raises:
        BecameError: if it is neither square nor a factor, not of the width asked for, or not finite.
    """
    checked = _checked(name, gram, width)
    if not _is_factor(checked):
        return checked
    xp: Any = namespace(factor=checked)
    return xp.matmul(xp.matrix_transpose(checked), checked)


def _checked(name: str, gram: Array, width: int | None) -> Array:
    xp: Any = namespace(gram=gram)
    shape = tuple(gram.shape)
    if len(shape) != 2 or shape[0] > shape[1] or width not in (None, shape[1]):
        expected = "square" if width is None else f"[{width}, {width}]"
        raise BecameError(
            f"the Gram matrix of '{name}' has shape {shape}; it must be {expected}, or a factor of fewer rows."
        )
    check_values(xp.all(xp.isfinite(gram)), f"the Gram matrix of '{name}' is not finite; look for NaN in the network.")
    return wide(gram)


def _is_factor(gram: Array) -> bool:
    return int(gram.shape[0]) < int(gram.shape[1])


def complement(basis: Array) -> Array:
    """Return orthonormal columns [d, d - k] that complete those of a basis [d, k]."""
    xp: Any = namespace(basis=basis)
    width, rank = basis.shape
    if not rank:
        return xp.eye(width, dtype=basis.dtype, device=device(basis))
    return xp.linalg.qr(basis, mode="complete")[0][:, rank:]


def rounding(gram: Array, total: Array) -> Array:
    """Return the energy below which a Gram matrix, as it came, is rounding: a unit of its dtype beside its trace."""
    xp: Any = namespace(gram=gram)
    return total * float(xp.finfo(gram.dtype).eps)


def spectrum(symmetric: Array) -> tuple[Array, Array]:
    """Return the eigenvalues of a positive semi-definite matrix, descending and none below 0, and its eigenvectors."""
    xp: Any = namespace(symmetric=symmetric)
    values, vectors = xp.linalg.eigh((symmetric + xp.matrix_transpose(symmetric)) / 2)
    return xp.clip(xp.flip(values), 0.0, None), xp.flip(vectors, axis=1)


def energies(name: str, gram: Array, basis: Array | None) -> Energies:
    """Return where a Gram matrix [d, d], or a factor [n, d] of one, has its energy beside a basis [d, k].

    None is a basis of no direction.

    Raises:
        BecameError: if the Gram matrix is not square or does not fit the basis.
    """
    xp: Any = namespace(gram=gram) if basis is None else namespace(gram=gram, basis=basis)
    c = _checked(name, gram, None if basis is None else int(basis.shape[0]))
    m = xp.matrix_transpose(c)[:, :0] if basis is None else wide(basis)
    if _is_factor(c):
        return _energies_of_factor(c, m, gram)
    if m.shape[1]:
        n = complement(m)
        new, vectors = spectrum(xp.matmul(xp.matmul(xp.matrix_transpose(n), c), n))
        directions = xp.matmul(n, vectors)
    else:
        new, directions = spectrum(c)
    total = xp.linalg.trace(c)
    return Energies(
        total=total,
        floor=rounding(gram, total),
        old=xp.clip(xp.sum(m * xp.matmul(c, m), axis=0), 0.0, None),
        new=new,
        directions=directions,
        captured=total - xp.sum(new),
    )


def _energies_of_factor(factor: Array, m: Array, gram: Array) -> Energies:
    xp: Any = namespace(factor=factor)
    residual = factor
    for _ in range(2 if m.shape[1] else 0):  # once more for what rounding left
        residual = residual - xp.matmul(xp.matmul(residual, m), xp.matrix_transpose(m))
    new, vectors = spectrum(xp.matmul(residual, xp.matrix_transpose(residual)))
    total = xp.sum(factor * factor)
    floor = rounding(gram, total)
    sigma = xp.sqrt(xp.where(new > floor, new, xp.ones_like(new)))
    return Energies(
        total=total,
        floor=floor,
        old=xp.sum(xp.square(xp.matmul(factor, m)), axis=0),
        new=new,
        directions=xp.matmul(xp.matrix_transpose(residual), vectors) / sigma,
        captured=total - xp.sum(new),
    )


def min_directions(values: Array, wanted: Array, *, held: Array | float = 0.0, floor: Array | float = 0.0) -> int:
    """Return how many leading values bring ``held`` to what is wanted; none that is not above the floor."""
    xp: Any = namespace(values=values)
    if not values.shape[0] or bool(wanted <= held):
        return 0
    short = int(xp.sum(xp.astype(held + xp.cumulative_sum(values) < wanted, xp.int32)))
    return min(short + 1, int(xp.sum(xp.astype(values > floor, xp.int32))))
