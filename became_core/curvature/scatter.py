"""Sums of rows by key, as the gradients of embeddings need them, without the scatter that the Array API lacks.

Rows are sorted by key; then each adds the row 1, 2, 4, … places below it as long as the key is the same, until the
first row of a key holds the sum of all its rows. All shapes are known beforehand, and sums are pairwise.

Convention: rows are [samples, positions, d], keys integers [samples, positions] in [0, size).
"""

from typing import Any

from became_core.arrays import Array, device, namespace, reduction_dtype

__all__ = ["scattered_squares", "scattered_sums"]


def scattered_sums(rows: Array, keys: Array, size: int) -> Array:
    """Return, for each sample, the sums of its rows by key, [samples, size, d]; zeros for keys that are absent."""
    xp, flat, tagged = _by_sample(rows, keys, size)
    n, positions, d = rows.shape
    summed, tags = _summed(xp, flat, tagged, longest=positions)
    return xp.reshape(_first_of_each(xp, summed, tags, n * size), (n, size, d))


def scattered_squares(rows: Array, keys: Array, size: int) -> Array:
    """Return the sum over samples of the squares of ``scattered_sums``, [size, d], never holding them all."""
    xp, flat, tagged = _by_sample(rows, keys, size)
    summed, tags = _summed(xp, flat, tagged, longest=rows.shape[1])
    # A sample's sum is in the first row of its key; the rows below it, parts of the sum, must not be counted.
    is_first = xp.concat([xp.ones_like(tags[:1]) > 0, tags[1:] != tags[:-1]])
    squares = xp.where(is_first[:, None], summed * summed, xp.zeros_like(summed))
    total, found = _summed(xp, squares, tags % size, longest=squares.shape[0])
    return _first_of_each(xp, total, found, size)


def _by_sample(rows: Array, keys: Array, size: int) -> tuple[Any, Array, Array]:
    """The namespace, the rows [samples x positions, d], and for each a key of its sample's own."""
    xp = namespace(rows=rows, keys=keys)
    n, positions, d = rows.shape
    flat = xp.reshape(xp.astype(rows, reduction_dtype(xp, rows=rows), copy=False), (n * positions, d))
    samples = xp.arange(n, dtype=keys.dtype, device=device(keys))
    return xp, flat, xp.reshape(keys + size * samples[:, None], (n * positions,))


def _summed(xp: Any, rows: Array, keys: Array, longest: int) -> tuple[Array, Array]:
    """Rows sorted by key, the first row of each key being the sum of all of them; and the sorted keys.

    Args:
        xp: the namespace.
        rows: [n, d].
        keys: [n].
        longest: no key has more rows than this.
    """
    order = xp.argsort(keys, stable=True)
    rows, keys = xp.take(rows, order, axis=0), xp.take(keys, order, axis=0)
    reach = 1
    while reach < min(longest, keys.shape[0]):
        same = xp.astype(keys[:-reach] == keys[reach:], rows.dtype)[:, None]
        rows = xp.concat([rows[:-reach, :] + same * rows[reach:, :], rows[-reach:, :]], axis=0)
        reach *= 2
    return rows, keys


def _first_of_each(xp: Any, rows: Array, keys: Array, count: int) -> Array:
    """For each key below ``count`` the first of its rows, or zeros if it has none, [count, d]; keys are sorted."""
    wanted = xp.arange(count, dtype=keys.dtype, device=device(keys))
    last = keys.shape[0] - 1
    places = xp.astype(xp.searchsorted(keys, wanted), keys.dtype)
    places = xp.where(places > last, xp.full_like(places, last), places)
    found = xp.take(keys, places, axis=0) == wanted
    rows = xp.take(rows, places, axis=0)
    return xp.where(found[:, None], rows, xp.zeros_like(rows))
