"""Taps: a layer's inputs, and the gradient of the loss with respect to its outputs, over a batch.

Curvature and projection are computed from taps alone, so this is all that a backend must offer for them. The functions
of this module turn taps into gradients by parameters: of each sample, of the batch, and as sums of squares.

Convention: inputs a are [samples, positions, d_in] and output gradients g are [samples, positions, d_out]. g is the
gradient of each sample's own loss, not divided by the number of samples. A linear layer on flat inputs has one
position. A convolution has one position for each place of its kernel in the image, and a patch is flattened as the
weight is (d_in = channels x height x width of the kernel). A layer that runs several times in a pass has the positions
of all runs, because a gradient is a sum over positions and runs alike. Everything is computed in the promoted dtype of
a and g, and at least in float32.

Per-sample gradients are squared and summed for some samples at a time, and of a large matrix for some of its rows, so
that at most ``CHUNK`` numbers of them exist. They then stay in the processor's cache, and memory is bounded for any
batch size.

The gradient of an embedding is a sum of rows by key. The Array API has no scatter, so rows are sorted by key; then each
row adds the row 1, 2, 4, ... positions below it, as long as that has the same key. In the end the first row of a key is
the sum of all its rows. All shapes are known beforehand, so this can be compiled, and sums are pairwise, so they are
accurate.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from became_core.arrays import Array, Params, device, namespace, pytree, reduction_dtype, static

__all__ = [
    "Tap",
    "Taps",
    "batch_gradient",
    "inputs_of_uses",
    "joined_uses",
    "per_sample_factors",
    "per_sample_gradients",
    "per_sample_square_sum",
    "row_counts",
]

# How many numbers of per-sample gradients exist at a time: 4 MiB of float32, which fit in a processor's cache.
CHUNK = 2**20

# How many samples' gradients of a block of a large matrix's rows exist at a time.
TOGETHER = 8


@pytree
@dataclass(frozen=True)
class Tap:
    """The inputs and output gradients of one layer over a batch.

    Attributes:
        kind: what the layer computes at each position l, and therefore what the gradient of its weight is:

            "matrix": y = W a + b with W [d_out, d_in]; the gradient is sum_l g_l a_l^T.
            "scale": y = w * a + b with w [d], as in a normalisation layer after it has normalised; sum_l g_l * a_l.
            "embedding": y = W[a] with W [size, d_out]; row v is the sum of g_l over the positions with a_l = v.
            "gradient": not a layer but a single parameter, by whose own name the tap goes; a is its gradient, and g
            is 1.
            "window": a matrix without groups whose inputs are all patches of images, one step apart; it holds the
            images, so that no patch is cut. Only the mode "inputs" makes it.
        inputs: [samples, positions, d_in]; of an embedding integers [samples, positions]; of a gradient
            [samples, 1, size of the parameter]; of a window the padded images, [samples, channels, height, width].
        output_gradients: [samples, positions, d_out]; of a gradient ones, [samples, 1, 1].
        has_bias: whether the layer has a ``bias`` as well as a ``weight``.
        groups: for a matrix, the number of blocks of equal size into which inputs and outputs are cut. A block of
            outputs depends on its own block of inputs alone, and W is [d_out, d_in / groups].
        size: for an embedding, the number of rows of W.
        kernel: for a window, or a matrix that has images, the kernel's height and width.
        images: for a matrix whose inputs are all patches of images, one step apart, the padded images too, [samples,
            channels, height, width], if they are given: a Gram matrix of them costs less.
        own_name: whether the tap goes by the weight's own name and not by its layer's; then it has no bias.
        transposed: for a matrix, whether W is stored as [d_in, d_out].
        padding: for an embedding, the index whose positions count for nothing; -1 if there is none.
        others: further uses of the same weight, of other kinds, whose gradients are added to this one's: an embedding
            that is also the network's last matrix, for example. All have the same samples, and none has a bias.
    """

    kind: Literal["matrix", "scale", "embedding", "gradient", "window"] = field(metadata={"static": True})
    inputs: Array
    output_gradients: Array
    has_bias: bool = static(default=False)
    groups: int = static(default=1)
    size: int = static(default=0)
    kernel: tuple[int, int] = static(default=(0, 0))
    own_name: bool = static(default=False)
    transposed: bool = static(default=False)
    padding: int = static(default=-1)
    images: Array | None = None
    others: tuple["Tap", ...] = ()

    def __getitem__(self, samples: slice) -> "Tap":
        """Return the tap of a slice of the samples, without images."""
        return replace(
            self,
            images=None,
            inputs=self.inputs[samples, ...],
            output_gradients=self.output_gradients[samples, ...],
            others=tuple(other[samples] for other in self.others),
        )

    @property
    def is_plain_matrix(self) -> bool:
        """Whether W [d_out, d_in] is one whole matrix that is used in no other way, as Kronecker factors need it."""
        return self.kind == "matrix" and self.groups == 1 and not self.transposed and not self.others

    def weight_name(self, name: str) -> str:
        """Return the name of the weight of the tap that goes by a name: ``fc.weight`` for a layer ``fc``."""
        return name if self.own_name or self.kind == "gradient" else f"{name}.weight"


def joined_uses(uses: Sequence[Tap], inputs: Sequence[Array] | None = None) -> Tap:
    """Return all uses of one weight as one tap: those of one kind have their positions in a row.

    Args:
        uses: at least one, all of the same samples; or some of them are sums over all samples, with one sample.
        inputs: what ``inputs_of_uses`` returned of these uses for another backward pass of the same batch. The tap has
            these arrays, so that the passes share them.

    Examples:
        >>> import numpy as np
        >>> use = Tap("matrix", np.ones((2, 1, 3)), np.ones((2, 1, 4)))
        >>> joined_uses([use, use]).inputs.shape
        (2, 2, 3)
    """
    alike: dict[tuple[Any, ...], list[Tap]] = {}
    for use in uses:
        alike.setdefault((use.kind, use.transposed, use.groups), []).append(use)
    known: Sequence[Array | None] = [None] * len(alike) if inputs is None else inputs
    first, *others = (_in_a_row(of_kind, own) for of_kind, own in zip(alike.values(), known, strict=True))
    return replace(first, others=tuple(others))


def _in_a_row(taps: Sequence[Tap], inputs: Array | None) -> Tap:
    if len(taps) == 1:
        return taps[0] if inputs is None else replace(taps[0], inputs=inputs)
    xp: Any = namespace(inputs=taps[0].inputs)
    if taps[0].kind == "gradient":
        return replace(taps[0], inputs=xp.sum(xp.stack([tap.inputs for tap in taps]), axis=0))
    # If some have one sample and others have more, all are summed over samples.
    is_mixed = len({tap.inputs.shape[0] for tap in taps}) > 1

    def joined(side: Sequence[Array]) -> Array:
        rows = [xp.reshape(array, (1, -1, *array.shape[2:])) for array in side] if is_mixed else side
        return xp.concat(rows, axis=1)

    inputs = joined([tap.inputs for tap in taps]) if inputs is None else inputs
    gradients = joined([tap.output_gradients for tap in taps])
    return replace(taps[0], inputs=inputs, output_gradients=gradients, images=None)


# By the name of the layer: the tap of ``conv1`` belongs to ``conv1.weight`` and ``conv1.bias``. A tap of the kind
# "gradient", or one that says so, goes by the name of its parameter.
Taps = Mapping[str, Tap]


def inputs_of_uses(taps: Taps) -> dict[str, tuple[Array, ...]]:
    """Return the inputs of each tap's uses, one array for each kind; of a gradient, which has none, nothing.

    Examples:
        >>> import numpy as np
        >>> use = Tap("matrix", np.ones((2, 1, 3)), np.ones((2, 1, 4)))
        >>> [array.shape for array in inputs_of_uses({"fc": joined_uses([use, use])})["fc"]]
        [(2, 2, 3)]
    """
    return {
        name: tuple(use.inputs for use in (tap, *tap.others)) for name, tap in taps.items() if tap.kind != "gradient"
    }


def per_sample_square_sum(taps: Taps) -> Params:
    """Return, for each parameter, the sum over samples of the squared gradient of the sample's own loss.

    Args:
        taps: of one batch.

    Returns:
        By parameter; a weight is [d_out, d_in], a scale [d], and a single parameter is flat.

    Examples:
        >>> import numpy as np
        >>> taps = {"fc": Tap("matrix", np.array([[[2.0, 1.0]], [[1.0, 0.0]]]), np.array([[[3.0]], [[1.0]]]))}
        >>> per_sample_square_sum(taps)
        {'fc.weight': array([[37.,  9.]])}
    """
    squares: Params = {}
    for name, tap in _weights(taps):
        if tap.kind == "embedding" and not tap.others:
            squares[name] = _squares_by_key(tap.output_gradients, tap.inputs, tap.size)
        elif tap.is_plain_matrix and tap.inputs.shape[1] == 1:
            # With one position the square of g a^T is g^2 (a^2)^T, so the sum over samples is one matrix product.
            squares[name] = _weight_gradients(tap, squared=True)
        else:
            xp: Any = namespace(inputs=tap.inputs)
            blocks = [_sum_of_squares(block) for block in _blocks_of_rows(tap)]
            squares[name] = blocks[0] if len(blocks) == 1 else xp.concat(blocks)
    for name, tap in _biases(taps):
        squares[name] = _square_sum(_bias_gradients(tap))
    return squares


def row_counts(tap: Tap) -> Array:
    """Return how many positions look up each row of an embedding, [size]; those of the padding are none.

    It is the diagonal of the sum of a a^T over the embedding's inputs a, if they are seen as one-hot vectors.

    Examples:
        >>> import numpy as np
        >>> row_counts(Tap("embedding", np.array([[2, 0, 2]]), np.ones((1, 3, 1)), size=3))
        array([1., 0., 2.])
    """
    xp: Any = namespace(gradients=tap.output_gradients)
    counted = tap.inputs != tap.padding
    rows = xp.astype(counted, reduction_dtype(xp, gradients=tap.output_gradients))
    return _sums_by_key(xp.reshape(rows, (1, -1, 1)), xp.reshape(tap.inputs, (1, -1)), tap.size)[0, :, 0]


def per_sample_gradients(taps: Taps, *, without: Container[str] = ()) -> Params:
    """Return, for each parameter, the gradient of every sample's own loss.

    Its shape is [samples, *shape], with the shape that ``per_sample_square_sum`` returns.

    Args:
        taps: of one batch.
        without: names of weights to leave out.
    """
    gradients = {name: _weight_gradients(tap) for name, tap in _weights(taps) if name not in without}
    return gradients | {name: _bias_gradients(tap) for name, tap in _biases(taps)}


def per_sample_factors(taps: Taps) -> dict[str, tuple[Array, Array]]:
    """Return G [samples, d_out] and A [samples, d_in] of the weights whose gradient of every sample is g a^T.

    They are the matrices of layers with one position, and only those that have more entries than the two factors. Of a
    matrix that is stored as [d_in, d_out] it is A that comes first.

    Examples:
        >>> import numpy as np
        >>> taps = {"fc": Tap("matrix", np.ones((1, 1, 3)), np.ones((1, 1, 4)))}
        >>> [factor.shape for factor in per_sample_factors(taps)["fc.weight"]]
        [(1, 4), (1, 3)]
    """
    factors = {}
    for name, tap in _weights(taps):
        if tap.kind != "matrix" or tap.groups > 1 or tap.others or tap.inputs.shape[1] != 1:
            continue
        xp: Any = namespace(inputs=tap.inputs, output_gradients=tap.output_gradients)
        dtype = reduction_dtype(xp, inputs=tap.inputs, output_gradients=tap.output_gradients)
        sides = (tap.inputs, tap.output_gradients) if tap.transposed else (tap.output_gradients, tap.inputs)
        left, right = (xp.astype(side[:, 0, :], dtype, copy=False) for side in sides)
        if left.shape[1] + right.shape[1] < left.shape[1] * right.shape[1]:
            factors[name] = (left, right)
    return factors


def batch_gradient(taps: Taps) -> Params:
    """Return, for each parameter, the gradient of the sum of the samples' losses.

    Its shape is the one that ``per_sample_square_sum`` returns.
    """
    gradients: Params = {}
    for name, tap in _weights(taps):
        xp = namespace(inputs=tap.inputs)
        # The sum over samples is a sum over positions if all positions belong to one sample.
        whole = tap if tap.kind == "gradient" else _as_one_sample(tap)
        gradients[name] = xp.sum(_weight_gradients(whole), axis=0)
    for name, tap in _biases(taps):
        gradients[name] = namespace(inputs=tap.inputs).sum(_bias_gradients(tap), axis=0)
    return gradients


def _weights(taps: Taps) -> Iterator[tuple[str, Tap]]:
    for layer, tap in taps.items():
        yield tap.weight_name(layer), tap


def _biases(taps: Taps) -> Iterator[tuple[str, Tap]]:
    return ((f"{layer}.bias", tap) for layer, tap in taps.items() if tap.has_bias)


def _blocks_of_rows(tap: Tap) -> Iterator[Tap]:
    """Yield the taps of blocks of a matrix's rows, of which some samples' gradients fit in ``CHUNK`` numbers."""
    size = _size(tap)
    if tap.kind != "matrix" or tap.groups > 1 or tap.others or size <= CHUNK // TOGETHER:
        yield tap
        return
    side = "inputs" if tap.transposed else "output_gradients"
    array = getattr(tap, side)
    rows = int(array.shape[2])
    step = max(1, CHUNK // TOGETHER // (size // rows))
    for start in range(0, rows, step):
        block: dict[str, Any] = {side: array[:, :, start : min(start + step, rows)]}
        yield replace(tap, **block)


def _sum_of_squares(tap: Tap) -> Array:
    """Return the sum over samples of the squared weight gradients, at most ``CHUNK`` of which exist at a time."""
    samples = tap.inputs.shape[0]
    step = max(1, CHUNK // max(1, *(_size(use) for use in (tap, *tap.others))))
    total: Array = None
    for start in range(0, max(1, samples), step):
        square = _square_sum(_weight_gradients(tap[start : min(start + step, samples)]))
        total = square if total is None else total + square
    return total


def _size(tap: Tap) -> int:
    """Return how many numbers are made of one sample to get its weight gradient."""
    d_out = int(tap.output_gradients.shape[2])
    if tap.kind == "embedding":
        return tap.size * d_out
    d_in = int(tap.inputs.shape[2])
    return d_out * d_in // tap.groups if tap.kind == "matrix" else d_in * int(tap.inputs.shape[1])


def _as_one_sample(tap: Tap) -> Tap:
    xp = namespace(inputs=tap.inputs)
    a, g = (xp.reshape(x, (1, x.shape[0] * x.shape[1], *x.shape[2:])) for x in (tap.inputs, tap.output_gradients))
    return replace(tap, inputs=a, output_gradients=g, others=tuple(map(_as_one_sample, tap.others)))


def _weight_gradients(tap: Tap, *, squared: bool = False) -> Array:
    """Return each sample's weight gradient, [samples, ...].

    Args:
        tap: of a layer.
        squared: for a matrix with one position and without groups, return the sum over samples of the squares instead.
    """
    if tap.others:
        first, *others = (_weight_gradients(use) for use in (replace(tap, others=()), *tap.others))
        return sum(others, first)
    if tap.kind == "embedding":
        return _sums_by_key(tap.output_gradients, tap.inputs, tap.size)
    xp = namespace(inputs=tap.inputs, output_gradients=tap.output_gradients)
    dtype = reduction_dtype(xp, inputs=tap.inputs, output_gradients=tap.output_gradients)
    a, g = (xp.astype(x, dtype, copy=False) for x in (tap.inputs, tap.output_gradients))
    if tap.kind != "matrix":
        return xp.sum(g * a, axis=1)
    if squared:
        return xp.matmul(xp.matrix_transpose(xp.square(g[:, 0, :])), xp.square(a[:, 0, :]))
    if tap.groups == 1:
        left, right = (a, g) if tap.transposed else (g, a)
        return xp.matmul(xp.matrix_transpose(left), right)
    (n, positions, d_out), d_in = g.shape, a.shape[2]
    a, g = (xp.reshape(x, (n, positions, tap.groups, x.shape[2] // tap.groups)) for x in (a, g))
    blocks = xp.matmul(xp.permute_dims(g, (0, 2, 3, 1)), xp.permute_dims(a, (0, 2, 1, 3)))
    return xp.reshape(blocks, (n, d_out, d_in // tap.groups))


def _bias_gradients(tap: Tap) -> Array:
    xp = namespace(output_gradients=tap.output_gradients)
    dtype = reduction_dtype(xp, output_gradients=tap.output_gradients)
    return xp.sum(xp.astype(tap.output_gradients, dtype, copy=False), axis=1)


def _square_sum(per_sample: Array) -> Array:
    # Not in place: a framework that takes gradients through this needs the array as it was.
    return namespace(per_sample=per_sample).sum(per_sample * per_sample, axis=0)


def _sums_by_key(rows: Array, keys: Array, size: int) -> Array:
    """Return, for each sample, the sums of its rows by key, [samples, size, d]; an absent key has zeros.

    Args:
        rows: [samples, positions, d].
        keys: integers [samples, positions], in [0, size).
        size: how many keys there are.
    """
    xp, flat, sample_keys = _by_sample(rows, keys, size)
    n, positions, d = rows.shape
    summed, sorted_keys = _summed(xp, flat, sample_keys, longest=positions)
    return xp.reshape(_first_of_each(xp, summed, sorted_keys, n * size), (n, size, d))


def _squares_by_key(rows: Array, keys: Array, size: int) -> Array:
    """Return the sum over samples of the squares of ``_sums_by_key``, [size, d], without an array of all of them."""
    xp, flat, sample_keys = _by_sample(rows, keys, size)
    summed, sorted_keys = _summed(xp, flat, sample_keys, longest=rows.shape[1])
    # The sum of a sample's key is in the first of its rows. The rows below hold parts of the sum and are set to zero.
    is_first = xp.concat([xp.ones_like(sorted_keys[:1]) > 0, sorted_keys[1:] != sorted_keys[:-1]])
    squares = xp.where(is_first[:, None], summed * summed, xp.zeros_like(summed))
    total, total_keys = _summed(xp, squares, sorted_keys % size, longest=squares.shape[0])
    return _first_of_each(xp, total, total_keys, size)


def _by_sample(rows: Array, keys: Array, size: int) -> tuple[Any, Array, Array]:
    """Return the namespace, the rows as [samples x positions, d], and keys that no two samples share."""
    xp = namespace(rows=rows, keys=keys)
    n, positions, d = rows.shape
    flat = xp.reshape(xp.astype(rows, reduction_dtype(xp, rows=rows), copy=False), (n * positions, d))
    if xp.iinfo(keys.dtype).bits < 32:  # the product below would overflow
        keys = xp.astype(keys, xp.int32)
    samples = xp.arange(n, dtype=keys.dtype, device=device(keys))
    return xp, flat, xp.reshape(keys + size * samples[:, None], (n * positions,))


def _summed(xp: Any, rows: Array, keys: Array, longest: int) -> tuple[Array, Array]:
    """Return rows sorted by key, with the sum of a key's rows in the first of them; and the sorted keys.

    Args:
        xp: the namespace.
        rows: [n, d].
        keys: integers [n].
        longest: the largest number of rows that a key can have.
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
    """Return the first row of each key below ``count``, or zeros if it has none, [count, d]; the keys are sorted."""
    wanted = xp.arange(count, dtype=keys.dtype, device=device(keys))
    last = keys.shape[0] - 1
    positions = xp.astype(xp.searchsorted(keys, wanted), keys.dtype)
    positions = xp.where(positions > last, xp.full_like(positions, last), positions)
    is_present = xp.take(keys, positions, axis=0) == wanted
    rows = xp.take(rows, positions, axis=0)
    return xp.where(is_present[:, None], rows, xp.zeros_like(rows))
