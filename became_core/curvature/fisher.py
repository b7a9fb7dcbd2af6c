"""Diagonal Fisher information from taps.

Convention: a mean over samples.

- ``empirical``: E_n[(d loss_n / d theta)^2], the label as given, no dropout, batch statistics held constant.
- ``batch``: the published code's estimate, batch size x (gradient of the batch's mean loss)^2, averaged over batches,
  with the model's own most likely label and dropout on. It is kept so that published runs can be reproduced; being the
  square of a mean, it is far smaller and noisier than the exact one.
"""

from collections.abc import Iterable
from typing import Literal

from became_core.arrays import Array, Params, namespace
from became_core.curvature.taps import Taps, batch_gradient, per_sample_square_sum
from became_core.errors import BecameError

__all__ = ["FisherKind", "diagonal_fisher"]

FisherKind = Literal["empirical", "batch"]


def diagonal_fisher(batches: Iterable[Taps], parameters: Params, kind: FisherKind) -> Params:
    """Return the diagonal Fisher information of every parameter, each in its parameter's shape.

    Args:
        batches: the taps of each batch, made with the labels and the mode that the kind asks for.
        parameters: all parameters; those of which no tap speaks get zeros (another task's head).
        kind: "empirical" or "batch", as this module defines them.

    Raises:
        BecameError: if there are no batches, or a tap speaks of an unknown parameter.
    """
    total: Params = {}
    samples = 0
    for taps in batches:
        size = next(iter(taps.values())).inputs.shape[0]
        samples += size
        for name, value in _contribution(taps, kind).items():
            total[name] = total[name] + value if name in total else value
    if not samples:
        raise BecameError("the Fisher information needs at least one sample; none was given.")
    unknown = sorted(set(total) - set(parameters))
    if unknown:
        raise BecameError(f"a tap speaks of '{unknown[0]}', which is no parameter of the model.")
    return {name: _in_shape(total.get(name), like) / samples for name, like in parameters.items()}


def _contribution(taps: Taps, kind: FisherKind) -> Params:
    if kind == "empirical":
        return per_sample_square_sum(taps)
    # size x [ size x (sum / size)^2 ]: the batch's estimate, weighed by its samples.
    return {name: gradient * gradient for name, gradient in batch_gradient(taps).items()}


def _in_shape(value: Array | None, like: Array) -> Array:
    xp = namespace(parameter=like)
    return xp.zeros_like(like) if value is None else xp.reshape(value, like.shape)
