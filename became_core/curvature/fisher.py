"""Diagonal Fisher information from taps.

Convention: a mean over samples. The first three kinds are means of squared per-sample gradients, without dropout and
with batch statistics as constants. They differ in the labels with which the taps were made:

- ``empirical``: the labels of the data.
- ``true``: E_n E_{c ~ p_n} [(d loss_n(c) / d theta)^2], the exact expectation over labels drawn from the model. For
  cross-entropy it is the exact diagonal of the generalised Gauss-Newton matrix.
- ``sampled``: an estimate of that expectation, from one label a sample, drawn from the model.
- ``batch``: the estimate of the published code, s x the mean over samples of (gradient of the batch's mean loss)^2, at
  the model's most likely labels and with dropout; s is the size of the first batch, and makes it comparable with the
  other kinds. A smaller last batch is weighed as published: by its own samples, after its gradient was divided by its
  own size. It is here so that published runs can be reproduced. As the square of a mean, it is far smaller and noisier
  than the other kinds.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from became_core.arrays import Array, Params, namespace
from became_core.curvature.base import TapMode
from became_core.curvature.exchange import Exchange
from became_core.curvature.taps import Tap, Taps, batch_gradient, per_sample_square_sum
from became_core.errors import BecameError

__all__ = ["TAP_MODES", "FisherKind", "FisherTargets", "diagonal_fisher", "square_sums"]

# How many samples of a layer with one position are gathered before their squares are summed.
GATHERED = 512

# Of which targets Fisher information is: those given, or the model's own, exactly or drawn.
FisherTargets = Literal["empirical", "true", "sampled"]
# "batch" is the published estimate, of squared gradients of batches.
FisherKind = Literal[FisherTargets, "batch"]

# The mode of the taps that each kind is computed from.
TAP_MODES: dict[FisherKind, TapMode] = {
    "empirical": "empirical",
    "true": "true",
    "sampled": "sampled",
    "batch": "published",
}


def diagonal_fisher(
    batches: Iterable[Taps],
    parameters: Params,
    kind: FisherKind,
    *,
    samples: float,
    sizes: Sequence[int] | None = None,
    first: int | None = None,
    exchange: Exchange | None = None,
) -> Params:
    """Return the diagonal Fisher information of every parameter, each in its parameter's shape.

    Args:
        batches: the taps of each batch, made in the mode ``TAP_MODES[kind]``. In the mode "true" a batch has one set of
            taps for each class, and their squares are added.
        parameters: all parameters; one that has no tap, such as the head of another task, gets zeros.
        kind: one of the kinds that this module defines.
        samples: how many samples all batches have together; a batch with several sets of taps is counted once.
            It is what the mean loss divides by, which may be a number of tokens.
        sizes: how many samples each batch has; only the kind "batch" needs it, and None says that all have as many.
        first: how many the first batch of all has, if that is not the first one here.
        exchange: if the batches are shared out among processes, how their sums are added; ``samples`` are those of all.

    Raises:
        BecameError: if there are no samples or no batches, or a tap belongs to an unknown parameter.

    Examples:
        >>> import numpy as np
        >>> tap = Tap("matrix", np.array([[[2.0, 1.0]]]), np.array([[[3.0]]]))  # one sample: a = (2, 1), g = 3
        >>> diagonal_fisher([{"fc": tap}], {"fc.weight": np.zeros((1, 2))}, "empirical", samples=1)
        {'fc.weight': array([[36.,  9.]])}
    """
    total = _sum_of(_published(batches, sizes, first)) if kind == "batch" else square_sums(batches)
    if not samples > 0 or not total:
        raise BecameError("the Fisher information needs at least one sample; none was given.")
    unknown = sorted(set(total) - set(parameters))
    if unknown:
        raise BecameError(f"a tap belongs to '{unknown[0]}', which is no parameter of the model.")
    if exchange is not None:
        total = exchange.total({name: _in_shape(total.get(name), like) for name, like in parameters.items()})
    return {name: _in_shape(total.get(name), like) / samples for name, like in parameters.items()}


def square_sums(batches: Iterable[Taps]) -> Params:
    """Return ``per_sample_square_sum`` over all batches; it takes their taps one by one."""
    return _sum_of(map(per_sample_square_sum, _gathered(batches)))


def _sum_of(parts: Iterable[Params]) -> Params:
    total: Params = {}
    for part in parts:
        for name, value in part.items():
            if name in total:
                # The array in ``total`` was made here, so it may be changed in place; this saves an array as large as
                # the parameter in every batch.
                total[name] += _shaped_as(total[name], value)
            else:
                total[name] = value
    return total


def _shaped_as(total: Array, value: Array) -> Array:
    """Return a value in the shape of a total: that of a single parameter, which other batches use, is flat."""
    if value.shape == total.shape:
        return value
    xp: Any = namespace(value=value)
    return xp.reshape(value, total.shape)


def _gathered(batches: Iterable[Taps]) -> Iterator[Taps]:
    """Yield the same taps, but gather those of matrices with one position until they have ``GATHERED`` samples.

    The sum of their squares is one matrix product whose result is as large as the weight. Writing the result takes most
    of the time if there are few samples, so it is written once for many.
    """
    waiting: dict[str, list[Tap]] = {}
    for taps in batches:
        ready = dict(taps)
        for layer, tap in taps.items():
            if tap.is_plain_matrix and tap.inputs.shape[1] == 1:
                gathered = [*waiting.pop(layer, ()), ready.pop(layer)]
                if sum(part.inputs.shape[0] for part in gathered) < GATHERED:
                    waiting[layer] = gathered
                else:
                    ready[layer] = _joined(gathered)
        yield ready
    yield {layer: _joined(gathered) for layer, gathered in waiting.items()}


def _joined(taps: Sequence[Tap]) -> Tap:
    """Return the tap of all samples of several batches, from one layer's tap of each batch."""
    xp: Any = namespace(inputs=taps[0].inputs)
    a, g = (xp.concat([getattr(tap, side) for tap in taps], axis=0) for side in ("inputs", "output_gradients"))
    return replace(taps[0], inputs=a, output_gradients=g)


def _published(batches: Iterable[Taps], sizes: Sequence[int] | None, first: int | None) -> Iterator[Params]:
    """Yield s n (G / n)^2 for each batch, with n its size, G its summed gradient and s the size of the first batch."""
    first = sizes[0] if sizes and first is None else first
    for number, taps in enumerate(batches):
        squares = {name: gradient * gradient for name, gradient in batch_gradient(taps).items()}
        if sizes is not None and first is not None and sizes[number] != first:
            squares = {name: first / sizes[number] * square for name, square in squares.items()}
        yield squares


def _in_shape(value: Array | None, like: Array) -> Array:
    xp = namespace(parameter=like)
    return xp.zeros_like(like) if value is None else xp.reshape(value, like.shape)
