"""Gram matrices of layer inputs and of gradients, from taps: what projectors remember a task by.

Convention: means, of inputs over samples and positions, of gradients over batches; in at least float32.
"""

from collections.abc import Iterable
from typing import Any

from became_core.arrays import Array, Params, namespace, reduction_dtype
from became_core.curvature.taps import Taps, batch_gradient

__all__ = ["gradient_grams", "input_grams"]


def input_grams(batches: Iterable[Taps], weights: frozenset[str]) -> Params:
    """Return, for each of these weights that taps speak of, the mean of a a^T over its layer's inputs, [d_in, d_in].

    Where a layer has fewer inputs than columns, n < d_in, their matrix F [n, d_in] takes its place, scaled so that the
    mean is F^T F: it is smaller, and so is its singular value decomposition.

    Args:
        batches: the taps of each batch.
        weights: names of weights, ``conv1.weight``.
    """
    sums: Params = {}
    factors: Params = {}
    rows: dict[str, int] = {}
    for taps in batches:
        for name, tap in _of(weights, taps).items():
            a = tap.inputs
            xp: Any = namespace(inputs=a)
            a = xp.reshape(a, (-1, a.shape[2]))
            rows[name] = rows.get(name, 0) + int(a.shape[0])
            if name in factors:
                a = xp.concat([factors.pop(name), a])
            if name in sums or a.shape[0] >= a.shape[1]:
                _add(sums, name, _gram(a))
            else:
                factors[name] = a
    scaled = {name: _wide(factor) / rows[name] ** 0.5 for name, factor in factors.items()}
    return scaled | {name: total / rows[name] for name, total in sums.items()}


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
    xp = namespace(rows=rows)
    rows = _wide(rows)
    return xp.matmul(xp.matrix_transpose(rows), rows)


def _wide(rows: Array) -> Array:
    xp = namespace(rows=rows)
    return xp.astype(rows, reduction_dtype(xp, rows=rows), copy=False)


def _add(sums: Params, name: str, gram: Array) -> None:
    sums[name] = sums[name] + gram if name in sums else gram
