"""Kronecker factors of the curvature from taps, K-FAC (Martens and Grosse 2015, arXiv 1503.05671).

The curvature of a weight is approximated by the Kronecker product A x G, with A from its layer's inputs a and G from
its output gradients g. For a layer with R positions, such as a convolution, there are two ways to average over them
(Eschenhagen et al. 2023, arXiv 2311.00636):

    expand    A = E_n[ 1/R sum_l a_nl a_nl^T ]                   G = E_n[ sum_l g_nl g_nl^T ]
    reduce    A = E_n[ abar_n abar_n^T ], abar = 1/R sum_l a_l   G = E_n[ gbar_n gbar_n^T ], gbar = sum_l g_l

With one position the two are the same. Whether the labels are those of the data, drawn from the model, or every class,
is decided by the mode of the taps.

Convention: means over samples. In the mode "true", in which a batch has several sets of taps, A is their mean and G
their sum. A bias has a block of its own, 1 x G; this is the block of a column of ones appended to the inputs, without
the terms that couple it to the weight. A parameter that is not a plain matrix (a scale, an embedding, a grouped
convolution or a single parameter) has its exact diagonal instead of factors.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from became_core.arrays import Array, Params, device, namespace, reduction_dtype
from became_core.curvature.exchange import Exchange
from became_core.curvature.taps import Tap, Taps, per_sample_square_sum
from became_core.errors import BecameError

__all__ = ["KroneckerFactors", "Sharing", "kronecker_factors"]

Sharing = Literal["expand", "reduce"]


class KroneckerFactors(NamedTuple):
    """A curvature: Kronecker factors of some parameters, and the diagonal of the others.

    Attributes:
        factors: (A [d_in, d_in], G [d_out, d_out]) by parameter; the A of a bias is [[1]].
        diagonal: the diagonal of each parameter that has no factors, flat or as [d_out, d_in].
    """

    factors: Mapping[str, tuple[Array, Array]]
    diagonal: Params


def kronecker_factors(
    batches: Iterable[Taps],
    *,
    samples: int,
    sharing: Sharing = "expand",
    units: float | None = None,
    exchange: Exchange | None = None,
) -> KroneckerFactors:
    """Return the curvature of all parameters that have taps.

    Args:
        batches: the taps of each batch; the several sets of taps that a batch has in the mode "true" follow each other.
        samples: how many samples all batches have together; a batch with several sets of taps is counted once.
        sharing: how positions are averaged, as this module defines it.
        units: what the mean loss divides by, if not by the samples: the number of tokens, for example.
        exchange: if the batches are shared out among processes, how their sums are added; ``samples`` and ``units`` are
            those of all.

    Raises:
        BecameError: if there are no samples or no batches.

    Examples:
        >>> import numpy as np
        >>> tap = Tap("matrix", np.array([[[2.0, 1.0]]]), np.array([[[3.0]]]))  # one sample: a = (2, 1), g = 3
        >>> kronecker_factors([{"fc": tap}], samples=1).factors["fc.weight"]
        (array([[4., 2.],
               [2., 1.]]), array([[9.]]))
    """
    inputs: Params = {}
    outputs: Params = {}
    diagonal: Params = {}
    biased: set[str] = set()
    latest: dict[str, Array] = {}
    names: dict[str, str] = {}
    for taps in batches:
        for layer, tap in taps.items():
            if not tap.is_plain_matrix:
                _add_to(diagonal, per_sample_square_sum({layer: tap}))
                continue
            # The sets of taps of one batch share the array of their inputs, which must be counted once.
            if latest.get(layer) is not tap.inputs:
                _add_to(inputs, {layer: _gram(tap, "inputs", sharing)})
                latest[layer] = tap.inputs
            _add_to(outputs, {layer: _gram(tap, "output_gradients", sharing)})
            names[layer] = tap.weight_name(layer)
            biased |= {layer} if tap.has_bias else set()
    if samples < 1 or not (outputs or diagonal):
        raise BecameError("Kronecker factors need at least one sample; none was given.")
    if exchange is not None:
        inputs, outputs, diagonal = (exchange.total(sums) for sums in (inputs, outputs, diagonal))
    units = samples if units is None else units
    factors = {}
    for layer, g in outputs.items():
        factors[names[layer]] = (inputs[layer] / samples, g / units)
        if layer in biased:
            factors[f"{layer}.bias"] = (namespace(g=g).ones((1, 1), dtype=g.dtype, device=device(g)), g / units)
    return KroneckerFactors(factors, {name: value / units for name, value in diagonal.items()})


def _add_to(total: Params, parts: Params) -> None:
    for name, part in parts.items():
        total[name] = total[name] + part if name in total else part


def _gram(tap: Tap, side: Literal["inputs", "output_gradients"], sharing: Sharing) -> Array:
    """Return the sum over samples of x x^T, where x are inputs or output gradients, averaged as ``sharing`` says."""
    x = tap.inputs if side == "inputs" else tap.output_gradients
    xp: Any = namespace(x=x)
    x = xp.astype(x, reduction_dtype(xp, x=x), copy=False)
    positions = x.shape[1] if side == "inputs" else 1
    if sharing == "reduce":
        rows, scale = xp.sum(x, axis=1) / positions, 1
    else:
        rows, scale = xp.reshape(x, (x.shape[0] * x.shape[1], x.shape[2])), positions
    return xp.matmul(xp.matrix_transpose(rows), rows) / scale
