"""Kronecker factors of the curvature from taps, K-FAC (Martens and Grosse 2015, arXiv 1503.05671).

A weight's block is approximated by A x G, with A from its layer's inputs and G from its output gradients. Where a layer
has R positions (convolutions, sequences) there are two ways (Eschenhagen et al. 2023, arXiv 2311.00636):

    expand    A = E_n[ 1/R sum_l a_nl a_nl^T ]                   G = E_n[ sum_l g_nl g_nl^T ]
    reduce    A = E_n[ abar_n abar_n^T ], abar = 1/R sum_l a_l   G = E_n[ gbar_n gbar_n^T ], gbar = sum_l g_l

With one position the two are the same. The labels, given, all or sampled, are those of the taps.

Convention: means over samples; of the taps of one batch ("true" yields several) A is the mean and G the sum. A bias
stands apart, its block being 1 x G, that of an appended column of ones without what couples it to the weight. What is
no plain matrix (scales, embeddings, grouped convolutions, lone parameters) has its exact diagonal.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from became_core.arrays import Array, Params, device, namespace, reduction_dtype
from became_core.curvature.taps import Tap, Taps, per_sample_square_sum
from became_core.errors import BecameError

__all__ = ["KroneckerFactors", "Sharing", "kronecker_factors"]

Sharing = Literal["expand", "reduce"]


class KroneckerFactors(NamedTuple):
    """A curvature in the form of factors for some parameters and a diagonal for the others.

    Attributes:
        factors: (A [d_in, d_in], G [d_out, d_out]) by parameter name; of a bias, A is [[1]].
        diagonal: of the parameters that have no factors, each flat or as [d_out, d_in].
    """

    factors: Mapping[str, tuple[Array, Array]]
    diagonal: Params


def kronecker_factors(batches: Iterable[Taps], *, samples: int, sharing: Sharing = "expand") -> KroneckerFactors:
    """Return the factors of all parameters that taps speak of.

    Args:
        batches: the taps of each batch; several of one batch ("true") come one after the other.
        samples: how many samples the batches have together, each counted once.
        sharing: how positions are treated, as this module defines it.

    Raises:
        BecameError: if there are no samples or no batches.
    """
    inputs: Params = {}
    outputs: Params = {}
    diagonal: Params = {}
    biased: set[str] = set()
    seen: dict[str, Array] = {}
    for taps in batches:
        for layer, tap in taps.items():
            if tap.kind != "matrix" or tap.groups != 1:
                _add_to(diagonal, per_sample_square_sum({layer: tap}))
                continue
            if seen.get(layer) is not tap.inputs:  # the passes of one batch share their inputs
                _add_to(inputs, {layer: _gram(tap, "inputs", sharing)})
                seen[layer] = tap.inputs
            _add_to(outputs, {layer: _gram(tap, "output_gradients", sharing)})
            biased |= {layer} if tap.has_bias else set()
    if samples < 1 or not (outputs or diagonal):
        raise BecameError("Kronecker factors need at least one sample; none was given.")
    factors = {}
    for layer, g in outputs.items():
        factors[f"{layer}.weight"] = (inputs[layer] / samples, g / samples)
        if layer in biased:
            factors[f"{layer}.bias"] = (namespace(g=g).ones((1, 1), dtype=g.dtype, device=device(g)), g / samples)
    return KroneckerFactors(factors, {name: value / samples for name, value in diagonal.items()})


def _add_to(total: Params, parts: Params) -> None:
    for name, part in parts.items():
        total[name] = total[name] + part if name in total else part


def _gram(tap: Tap, side: Literal["inputs", "output_gradients"], sharing: Sharing) -> Array:
    """The sum over samples of x x^T, x being inputs or output gradients with their positions as ``sharing`` says."""
    x = tap.inputs if side == "inputs" else tap.output_gradients
    xp: Any = namespace(x=x)
    x = xp.astype(x, reduction_dtype(xp, x=x), copy=False)
    positions = x.shape[1] if side == "inputs" else 1
    if sharing == "reduce":
        rows, scale = xp.sum(x, axis=1) / positions, 1
    else:
        rows, scale = xp.reshape(x, (x.shape[0] * x.shape[1], x.shape[2])), positions
    return xp.matmul(xp.matrix_transpose(rows), rows) / scale
