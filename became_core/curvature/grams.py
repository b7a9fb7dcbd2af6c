"""Gram matrices of layer inputs and of gradients, from taps: what projectors remember a task by.

Convention: means, of inputs over samples and positions, of gradients over batches; in at least float32.
"""

from collections.abc import Iterable
from typing import Any

from became_core.arrays import Array, Params, namespace, reduction_dtype
from became_core.curvature.taps import Tap, Taps, batch_gradient
from became_core.curvature.windows import window_gram

__all__ = ["gradient_grams", "input_grams"]

# The width up to which a symmetric product is computed whole: below, the halves cost more than they save.
SYMMETRIC = 512


def input_grams(batches: Iterable[Taps], weights: frozenset[str]) -> Params:
    """Return, for each of these weights that taps speak of, the mean of a a^T over its layer's inputs, [d_in, d_in].

    Where a layer has fewer inputs than columns, n < d_in, their matrix F [n, d_in] takes its place, scaled so that the
    mean is F^T F: it is smaller, and so is its singular value decomposition.

    Args:
        batches: the taps of each batch.
        weights: names of weights, ``conv1.weight``.
    """
    sums: Params = {}
    waiting: dict[str, list[Array]] = {}  # inputs that are not summed yet: the more at once, the faster
    rows: dict[str, int] = {}
    for taps in batches:
        for name, tap in _of(weights, taps).items():
            rows[name] = rows.get(name, 0) + _positions(tap)
            if tap.kind == "window":
                _add(sums, name, window_gram(_wide(tap.inputs), tap.kernel))
                continue
            xp = namespace(inputs=tap.inputs)
            waiting.setdefault(name, []).append(xp.reshape(tap.inputs, (-1, tap.inputs.shape[2])))
            if sum(int(a.shape[0]) for a in waiting[name]) >= tap.inputs.shape[2]:
                _add(sums, name, _gram(_joined(waiting.pop(name))))
    means: Params = {}
    for name, count in rows.items():
        if name in waiting and name in sums:
            _add(sums, name, _gram(_joined(waiting[name])))
        means[name] = sums[name] / count if name in sums else _wide(_joined(waiting[name])) / count**0.5
    return means


def _positions(tap: Tap) -> int:
    """How many inputs a layer had: samples times positions."""
    if tap.kind != "window":
        return int(tap.inputs.shape[0]) * int(tap.inputs.shape[1])
    samples, _, height, width = tap.inputs.shape
    return int(samples) * int(height - tap.kernel[0] + 1) * int(width - tap.kernel[1] + 1)


def _joined(parts: list[Array]) -> Array:
    xp: Any = namespace(first=parts[0])
    return parts[0] if len(parts) == 1 else xp.concat(parts)


def gradient_grams(batches: Iterable[Taps], weights: frozenset[str]) -> Params:
    """Return, for each of these weights that taps speak of, the mean over batches of G^T G, [d_in, d_in].

    G [d_out, d_in] is the gradient of a batch's mean loss; arguments as for ``input_grams``.
    """
    sums: Params = {}
    batch_counts: dict[str, int] = {}
    for taps in batches:
        for name, tap in _of(weights, taps).items():
            layer = name.removesuffix(".weight")
            gradient = batch_gradient({layer: tap})[name] / tap.inputs.shape[0]
            _add(sums, name, _gram(gradient))
            batch_counts[name] = batch_counts.get(name, 0) + 1
    return {name: total / batch_counts[name] for name, total in sums.items()}


def _of(weights: frozenset[str], taps: Taps) -> Taps:
    """The taps of these weights, by the weights' names."""
    return {f"{layer}.weight": tap for layer, tap in taps.items() if f"{layer}.weight" in weights}


def _gram(rows: Array) -> Array:
    """Return F^T F of rows F [n, d], where d is large as a block and its mirror image, which is computed once."""
    xp: Any = namespace(rows=rows)
    rows = _wide(rows)
    columns = int(rows.shape[1])
    if columns <= SYMMETRIC:
        return xp.matmul(xp.matrix_transpose(rows), rows)
    left, right = rows[:, : columns // 2], rows[:, columns // 2 :]
    across = xp.matmul(xp.matrix_transpose(left), right)
    upper = xp.concat([_gram(left), across], axis=1)
    return xp.concat([upper, xp.concat([xp.matrix_transpose(across), _gram(right)], axis=1)])


def _wide(rows: Array) -> Array:
    xp = namespace(rows=rows)
    return xp.astype(rows, reduction_dtype(xp, rows=rows), copy=False)


def _add(sums: Params, name: str, gram: Array) -> None:
    sums[name] = sums[name] + gram if name in sums else gram
