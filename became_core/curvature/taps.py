"""Taps: what a layer saw and what its output was held responsible for; all that curvature and projection ask for.

Convention: ``inputs`` a [samples, positions, d_in] and ``output_gradients`` g [samples, positions, d_out], g being the
gradient of each sample's own loss (a sum over samples, never a mean). A linear layer on flat inputs has one position; a
convolution has one for each place of its kernel, and its patches are flattened as its weight is (d_in = channels x
height x width of the kernel). A layer that runs more than once in a pass has the positions of all its runs, since a
gradient sums over both alike. Everything is computed in the promoted dtype of a and g, and at least float32.

No more than ``CHUNK`` numbers of per-sample gradients exist at a time: they are squared and summed while they are in
the processor's cache, and memory stays bounded however large the batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from became_core.arrays import Array, Params, namespace, pytree, reduction_dtype, static
from became_core.curvature.scatter import scattered_squares, scattered_sums

__all__ = ["Tap", "Taps", "batch_gradient", "per_sample_gradients", "per_sample_square_sum"]

# Per-sample gradients held at a time, in numbers: 4 MiB of float32, which a processor's cache holds.
CHUNK = 2**20


@pytree
@dataclass(frozen=True)
class Tap:
    """One layer's inputs and output gradients over a batch.

    Attributes:
        kind: what the layer computes at each position, and so what its weight's gradient is:

            "matrix": y = W a + b with W [d_out, d_in]; sum_l g_l a_l^T.
            "scale": y = w * a + b with w [d], a normalisation layer after its normalisation; sum_l g_l * a_l.
            "embedding": y = W[a] with W [size, d_out]; row v is the sum of g_l over the positions with a_l = v.
            "gradient": no layer but one parameter, by whose own name the tap goes; a is its gradient, g is 1.
            "window": a matrix whose inputs are all patches of images, in one group, a step of one apart; in mode
            "inputs" alone, where the patches themselves need not be cut.
        inputs: [samples, positions, d_in]; of an embedding integers [samples, positions]; of a gradient
            [samples, 1, size of the parameter]; of a window the images, padded, [samples, channels, height, width].
        output_gradients: [samples, positions, d_out]; of a gradient ones, [samples, 1, 1].
        has_bias: whether the layer has a ``bias`` beside its ``weight``.
        groups: of a matrix: into how many blocks of equal size inputs and outputs are cut, each block of outputs seeing
            its block of inputs alone; W is then [d_out, d_in / groups].
        size: of an embedding: how many rows W has.
        kernel: of a window: its height and width.
    """

    kind: Literal["matrix", "scale", "embedding", "gradient", "window"] = field(metadata={"static": True})
    inputs: Array
    output_gradients: Array
    has_bias: bool = static(default=False)
    groups: int = static(default=1)
    size: int = static(default=0)
    kernel: tuple[int, int] = static(default=(0, 0))

    def __getitem__(self, samples: slice) -> "Tap":
        """Return the tap of some of the samples."""
        return replace(self, inputs=self.inputs[samples, ...], output_gradients=self.output_gradients[samples, ...])


# By layer name: the tap of ``conv1`` speaks of ``conv1.weight`` and ``conv1.bias``. A tap of kind "gradient" goes by
# the name of its parameter.
Taps = Mapping[str, Tap]


def per_sample_square_sum(taps: Taps) -> Params:
    """Return, for each parameter, the sum over samples of the squared gradient of the sample's own loss.

    Weights come as [d_out, d_in] (a scale's as [d], a lone parameter's flat). With one position a matrix's square
    factors into g^2 and a^2, so that the sum over samples is one matrix product.
    """
    squares: Params = {}
    for name, tap in _weights(taps):
        if tap.kind == "embedding":
            squares[name] = scattered_squares(tap.output_gradients, tap.inputs, tap.size)
        elif tap.kind == "matrix" and tap.groups == 1 and tap.inputs.shape[1] == 1:
            squares[name] = _weight_gradients(tap, squared=True)
        else:
            squares[name] = sum(_square_sum(_weight_gradients(part)) for part in _chunks(tap))
    for name, tap in _biases(taps):
        squares[name] = _square_sum(_bias_gradients(tap))
    return squares


def per_sample_gradients(taps: Taps) -> Params:
    """Return, for each parameter, the gradient of every sample's own loss, [samples, *shape as in the squares]."""
    gradients = {name: _weight_gradients(tap) for name, tap in _weights(taps)}
    return gradients | {name: _bias_gradients(tap) for name, tap in _biases(taps)}


def batch_gradient(taps: Taps) -> Params:
    """Return, for each parameter, the gradient of the sum of the samples' losses; shapes as in the squares."""
    gradients: Params = {}
    for name, tap in _weights(taps):
        xp = namespace(inputs=tap.inputs)
        # All samples' positions are those of one.
        whole = tap if tap.kind == "gradient" else _as_one_sample(tap)
        gradients[name] = xp.sum(_weight_gradients(whole), axis=0)
    for name, tap in _biases(taps):
        gradients[name] = namespace(inputs=tap.inputs).sum(_bias_gradients(tap), axis=0)
    return gradients


def _weights(taps: Taps) -> Iterator[tuple[str, Tap]]:
    for layer, tap in taps.items():
        yield layer if tap.kind == "gradient" else f"{layer}.weight", tap


def _biases(taps: Taps) -> Iterator[tuple[str, Tap]]:
    return ((f"{layer}.bias", tap) for layer, tap in taps.items() if tap.has_bias)


def _chunks(tap: Tap) -> Iterator[Tap]:
    """The tap, some samples at a time, so many that their weight gradients are no more than ``CHUNK`` numbers."""
    samples, d_out, d_in = tap.inputs.shape[0], tap.output_gradients.shape[2], tap.inputs.shape[2]
    one = d_out * d_in // tap.groups if tap.kind == "matrix" else d_in * tap.inputs.shape[1]
    step = max(1, CHUNK // max(1, one))
    for start in range(0, samples, step):
        yield tap[start : min(start + step, samples)]


def _as_one_sample(tap: Tap) -> Tap:
    xp = namespace(inputs=tap.inputs)
    a, g = (xp.reshape(x, (1, x.shape[0] * x.shape[1], *x.shape[2:])) for x in (tap.inputs, tap.output_gradients))
    return replace(tap, inputs=a, output_gradients=g)


def _weight_gradients(tap: Tap, *, squared: bool = False) -> Array:
    """Each sample's weight gradient, [samples, ...]; or, of a matrix with one position, the sum of their squares."""
    if tap.kind == "embedding":
        return scattered_sums(tap.output_gradients, tap.inputs, tap.size)
    xp = namespace(inputs=tap.inputs, output_gradients=tap.output_gradients)
    dtype = reduction_dtype(xp, inputs=tap.inputs, output_gradients=tap.output_gradients)
    a, g = (xp.astype(x, dtype, copy=False) for x in (tap.inputs, tap.output_gradients))
    if tap.kind != "matrix":
        return xp.sum(g * a, axis=1)
    if squared:
        return xp.matmul(xp.matrix_transpose(xp.square(g[:, 0, :])), xp.square(a[:, 0, :]))
    if tap.groups == 1:
        return xp.matmul(xp.matrix_transpose(g), a)
    (n, positions, d_out), d_in = g.shape, a.shape[2]
    a, g = (xp.reshape(x, (n, positions, tap.groups, x.shape[2] // tap.groups)) for x in (a, g))
    blocks = xp.matmul(xp.permute_dims(g, (0, 2, 3, 1)), xp.permute_dims(a, (0, 2, 1, 3)))
    return xp.reshape(blocks, (n, d_out, d_in // tap.groups))


def _bias_gradients(tap: Tap) -> Array:
    xp = namespace(output_gradients=tap.output_gradients)
    dtype = reduction_dtype(xp, output_gradients=tap.output_gradients)
    return xp.sum(xp.astype(tap.output_gradients, dtype, copy=False), axis=1)


def _square_sum(per_sample: Array) -> Array:
    xp = namespace(per_sample=per_sample)
    return xp.sum(per_sample * per_sample, axis=0)
