"""Diagonal Fisher information from taps.

Convention: a mean over samples. All kinds but the last are means of squared per-sample gradients, without dropout and
with batch statistics held constant; they differ in the labels that the taps were made with:

- ``empirical``: the labels as given.
- ``true``: E_n E_{c ~ p_n} [(d loss_n(c) / d theta)^2], the exact expectation over the model's own labels, which for
  cross-entropy is the exact diagonal of the generalised Gauss-Newton matrix.
- ``sampled``: the same by Monte-Carlo, one label a sample.
- ``batch``: the published code's estimate, batch size x (gradient of the batch's mean loss)^2, averaged over batches,
  with the model's own most likely label and dropout on. It is kept so that published runs can be reproduced; being the
  square of a mean, it is far smaller and noisier than the others.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from became_core.arrays import Array, Params, namespace
from became_core.curvature.cotangents import TapMode
from became_core.curvature.taps import Tap, Taps, batch_gradient, per_sample_square_sum
from became_core.errors import BecameError

__all__ = ["TAP_MODES", "FisherKind", "diagonal_fisher"]

# Samples of a layer with one position that are gathered before their squares are summed.
GATHERED = 512

FisherKind = Literal["empirical", "true", "sampled", "batch"]

# The taps that each kind is made from.
TAP_MODES: dict[FisherKind, TapMode] = {
    "empirical": "empirical",
    "true": "true",
    "sampled": "sampled",
    "batch": "published",
}


def diagonal_fisher(batches: Iterable[Taps], parameters: Params, kind: FisherKind, *, samples: int) -> Params:
    """Return the diagonal Fisher information of every parameter, each in its parameter's shape.

    Args:
        batches: the taps of each batch, made in the mode that the kind asks for; several of one batch ("true") add.
        parameters: all parameters; those of which no tap speaks get zeros (another task's head).
        kind: as this module defines them.
        samples: how many samples the batches have together, each counted once.

    Raises:
        BecameError: if there are no samples or no batches, or a tap speaks of an unknown parameter.
    """
    parts = map(_squared_sum, batches) if kind == "batch" else map(per_sample_square_sum, _gathered(batches))
    total: Params = {}
    for part in parts:
        for name, value in part.items():
            if name in total:
                total[name] += value  # the sum so far is our own
            else:
                total[name] = value
    if samples < 1 or not total:
        raise BecameError("the Fisher information needs at least one sample; none was given.")
    unknown = sorted(set(total) - set(parameters))
    if unknown:
        raise BecameError(f"a tap speaks of '{unknown[0]}', which is no parameter of the model.")
    return {name: _in_shape(total.get(name), like) / samples for name, like in parameters.items()}


def _gathered(batches: Iterable[Taps]) -> Iterator[Taps]:
    """Yield the taps with layers of one position held back until they have many samples.

    For these the squares are one matrix product, as large as the weight: the more samples it sums over at once, the
    less often that much memory is written.
    """
    waiting: dict[str, list[Tap]] = {}
    for taps in batches:
        ready = dict(taps)
        for layer, tap in taps.items():
            if tap.kind == "matrix" and tap.groups == 1 and tap.inputs.shape[1] == 1:
                held = [*waiting.pop(layer, ()), ready.pop(layer)]
                if sum(each.inputs.shape[0] for each in held) < GATHERED:
                    waiting[layer] = held
                else:
                    ready[layer] = _joined(held)
        yield ready
    yield {layer: _joined(held) for layer, held in waiting.items()}


def _joined(taps: Sequence[Tap]) -> Tap:
    """One layer's taps of several batches as that of all their samples."""
    xp: Any = namespace(inputs=taps[0].inputs)
    a, g = (xp.concat([getattr(tap, side) for tap in taps], axis=0) for side in ("inputs", "output_gradients"))
    return replace(taps[0], inputs=a, output_gradients=g)


def _squared_sum(taps: Taps) -> Params:
    # size x [ size x (sum / size)^2 ]: the batch's estimate, weighed by its samples.
    return {name: gradient * gradient for name, gradient in batch_gradient(taps).items()}


def _in_shape(value: Array | None, like: Array) -> Array:
    xp = namespace(parameter=like)
    return xp.zeros_like(like) if value is None else xp.reshape(value, like.shape)
