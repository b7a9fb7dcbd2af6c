"""Gram matrices of layer inputs from taps: what projectors remember a task by.

Convention: a sum over samples and positions.
"""

from collections.abc import Iterable

from became_core.arrays import Params, namespace
from became_core.curvature.taps import Taps

__all__ = ["input_grams"]


def input_grams(batches: Iterable[Taps], weights: frozenset[str]) -> Params:
    """Return, for each of these weights that taps speak of, the sum of a a^T over its layer's inputs, [d_in, d_in].

    Args:
        batches: the taps of each batch.
        weights: names of weights, ``conv1.weight``.
    """
    grams: Params = {}
    for taps in batches:
        for layer, tap in taps.items():
            name = f"{layer}.weight"
            if name in weights:
                xp = namespace(inputs=tap.inputs)
                a = xp.reshape(tap.inputs, (-1, tap.inputs.shape[2]))
                gram = xp.matmul(xp.matrix_transpose(a), a)
                grams[name] = grams[name] + gram if name in grams else gram
    return grams
