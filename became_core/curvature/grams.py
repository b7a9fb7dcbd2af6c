"""Gram matrices of layer inputs and of gradients, from taps; projectors remember a task by them.

The inputs of a convolution are all patches of the images. Their Gram matrix is computed without cutting a patch. The
patch at (p, q) holds x[c, p + i, q + j] for each channel c and position (i, j) of the kernel, so the Gram matrix is

    G[(c, i, j), (c', i', j')] = sum_{n, p, q} x[n, c, p + i, q + j] x[n, c', p + i', q + j']

Along the height, this depends only on d = i' - i and on the rows that the sum is over. Let A_u be the rows u of all
images, unrolled along the width, and Z_d(u) = A_u A_{u+d}^T. The block of (i, i + d) is the sum of Z_d(u) over
u = i ... i + P - 1, P being the number of positions p, so one Z_d serves all i. Compared with the product of the matrix
of all patches with itself, arithmetic and memory are smaller by a factor of the kernel's height.

Convention: Gram matrices are means, of inputs over samples and positions, and of gradients over batches. They are
computed in at least float32.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from became_core.arrays import Array, Params, device, namespace, reduction_dtype
from became_core.curvature.exchange import Exchange
from became_core.curvature.taps import Tap, Taps, batch_gradient, row_counts
from became_core.errors import BecameError

__all__ = ["GramSums", "gradient_grams", "input_grams"]

# Up to this many columns, F^T F is one product. With more columns, half of it is computed and mirrored, which saves
# more time than the smaller products lose.
SYMMETRIC = 512

# The shape and the dtype of what is kept of a weight: of a sum, or [0, d_in] of rows that wait to be summed.
Layout = tuple[tuple[int, ...], Any]

# How a weight is used: whether its rows are looked up, whether it is stored as [d_in, d_out], and d_in.
Use = tuple[bool, bool, int]


def input_grams(batches: Iterable[Taps], weights: frozenset[str], exchange: Exchange | None = None) -> Params:
    """Return, for each weight that has a tap, the mean of a a^T over its layer's inputs a, [d_in, d_in].

    If a layer has only n < d_in inputs, the result is a factor F [n, d_in] instead, with F^T F the mean. It is smaller
    than the Gram matrix, and so is its singular value decomposition. An embedding's inputs are one-hot vectors, so that
    its Gram matrix is diagonal; that diagonal is the result, [size].

    Args:
        batches: the taps of each batch.
        weights: names of weights, such as ``conv1.weight``; those of other weights are left out.
        exchange: if the batches are shared out among processes, how they are brought together.

    Examples:
        >>> import numpy as np
        >>> tap = Tap("matrix", np.array([[[1.0, 0.0]], [[1.0, 2.0]], [[1.0, 1.0]]]), np.zeros((3, 1, 1)))
        >>> input_grams([{"fc": tap}], frozenset({"fc.weight"}))["fc.weight"] * 3
        array([[3., 3.],
               [3., 5.]])
    """
    sums = GramSums()
    for taps in batches:
        sums.add(taps, weights)
    return sums.means(exchange)


class GramSums:
    """Sums of a a^T over what layers read, to which batches are added one by one.

    Examples:
        >>> import numpy as np
        >>> sums = GramSums()
        >>> for row in ([1.0, 0.0], [1.0, 2.0]):
        ...     sums.add({"fc": Tap("matrix", np.array([[row]]), np.zeros((1, 1, 1)))}, frozenset({"fc.weight"}))
        >>> sums.means()["fc.weight"]
        array([[1., 1.],
               [1., 2.]])
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._sums: Params = {}
        # A product of d_in rows or more at a time is faster than many small ones, so inputs are gathered first.
        self._waiting: dict[str, list[Array]] = {}
        self._rows: dict[str, int] = {}
        self._uses: dict[str, Use] = {}

    def add(self, taps: Taps, weights: frozenset[str]) -> None:
        """Add what the layers of these weights read in a batch.

        Raises:
            BecameError: if a batch uses such a weight otherwise than to be multiplied with rows, or otherwise than an
                earlier batch: from its other side, or to look up rows that were multiplied.
        """
        for name, tap in _of(weights, taps).items():
            use = _use_of(tap)
            if use is None or self._uses.setdefault(name, use) != use:
                raise BecameError(
                    f"'{name}' is multiplied as a whole in one batch and used in another way in another batch, so that "
                    "no projector protects it; let the network use it alike, or freeze it."
                )
            self._rows[name] = self._rows.get(name, 0) + _positions(tap)
            if tap.kind == "embedding":
                _add(self._sums, name, row_counts(tap))
                continue
            images = tap.inputs if tap.kind == "window" else tap.images
            if images is not None:
                _add(self._sums, name, _window_gram(_wide(images), tap.kernel))
                continue
            xp = namespace(inputs=tap.inputs)
            self._add_rows(name, xp.reshape(tap.inputs, (-1, tap.inputs.shape[2])))

    def _add_rows(self, name: str, rows: Array) -> None:
        waiting = self._waiting.setdefault(name, [])
        waiting.append(rows)
        if sum(int(a.shape[0]) for a in waiting) >= rows.shape[1]:
            _add(self._sums, name, _gram(_joined(self._waiting.pop(name))))

    def parts(self) -> dict[str, tuple[Array, int]]:
        """Return, of one batch, the sum of a a^T or fewer rows a than d_in by weight, and how many a there are."""
        return {n: (self._sums[n] if n in self._sums else _joined(self._waiting[n]), c) for n, c in self._rows.items()}

    def add_parts(self, parts: Mapping[str, tuple[Array, int]]) -> None:
        """Add what ``parts`` returned."""
        for name, (array, count) in parts.items():
            self._rows[name] = self._rows.get(name, 0) + int(count)
            if len(array.shape) == 1 or array.shape[0] == array.shape[1]:
                _add(self._sums, name, array)
            else:
                self._add_rows(name, array)

    def layouts(self) -> dict[str, Layout]:
        """Return, by weight, the shape and dtype of the zeros that change nothing if they are added."""
        waiting = {name: ((0, int(parts[0].shape[1])), parts[0].dtype) for name, parts in self._waiting.items()}
        return waiting | {name: (tuple(map(int, gram.shape)), gram.dtype) for name, gram in self._sums.items()}

    def keep(self, weights: Collection[str]) -> None:
        """Forget the sums of all other weights than these."""
        for known in (self._sums, self._waiting, self._rows, self._uses):
            for name in known.keys() - set(weights):
                del known[name]

    def agree(self, layouts: Sequence[Mapping[str, Layout]], parameters: Params) -> None:
        """Have sums of the same weights in all processes; a weight that no batch of this process used has zeros.

        Args:
            layouts: what ``layouts`` returned in each process.
            parameters: arrays that lie where sums shall, by weight.
        """
        names = dict.fromkeys(name for of_one in layouts for name in of_one)
        self._rows = {name: self._rows.get(name, 0) for name in names}
        for name in names:
            known = [of_one[name] for of_one in layouts if name in of_one]
            # If one process has summed its rows, none has rows that wait.
            shape, dtype = next((layout for layout in known if layout[0][0]), known[0])
            rows = self._waiting.pop(name) if shape[0] and name in self._waiting else None
            if rows is not None:
                _add(self._sums, name, _gram(_joined(rows)))
            elif name not in (self._sums if shape[0] else self._waiting):
                xp: Any = namespace(parameter=parameters[name])
                nothing = xp.zeros(shape, dtype=dtype, device=device(parameters[name]))
                if shape[0]:
                    self._sums[name] = nothing
                else:
                    self._waiting[name] = [nothing]

    def means(self, exchange: Exchange | None = None) -> Params:
        """Return the means, as ``input_grams`` does; with an exchange this can be done once.

        Args:
            exchange: of processes that have sums of the same weights, as after ``agree``.
        """
        sums, waiting, rows = self._sums, self._waiting, self._rows
        if exchange is not None:
            rows = _of_all_processes(sums, waiting, rows, exchange)
        means: Params = {}
        for name, count in rows.items():
            if name in waiting and name in sums:
                _add(sums, name, _gram(_joined(waiting.pop(name))))
            means[name] = sums[name] / count if name in sums else _wide(_joined(waiting[name])) / count**0.5
        return means


def _of_all_processes(
    sums: Params, waiting: dict[str, list[Array]], rows: dict[str, int], exchange: Exchange
) -> dict[str, int]:
    """Put what all processes have into sums, and into what waits to be summed; return how many rows all have.

    Where all have fewer rows than columns, a factor of the Gram matrix is kept, as in one process.
    """
    if not rows:  # and so it is in all processes
        return rows
    rows = _total_counts(rows, [*sums.values(), *(parts[0] for parts in waiting.values())][0], exchange)
    for name in sorted(waiting):
        joined = _joined(waiting.pop(name))
        if rows[name] < joined.shape[1]:
            waiting[name] = [exchange.joined(joined)]
        else:
            _add(sums, name, _gram(joined))
    sums |= exchange.total(sums)
    return rows


def _total_counts(counts: dict[str, int], like: Array, exchange: Exchange) -> dict[str, int]:
    xp: Any = namespace(like=like)
    place = {"dtype": xp.float64, "device": device(like)}
    totals = exchange.total({name: xp.asarray(count, **place) for name, count in counts.items()})
    return {name: int(total) for name, total in totals.items()}


def _positions(tap: Tap) -> int:
    """Return how many inputs a layer has in a batch: samples times positions."""
    if tap.kind != "window":
        return int(tap.inputs.shape[0]) * int(tap.inputs.shape[1])
    samples, _, height, width = tap.inputs.shape
    return int(samples) * int(height - tap.kernel[0] + 1) * int(width - tap.kernel[1] + 1)


def _use_of(tap: Tap) -> Use | None:
    """Return how a batch uses a weight; None if not as a whole matrix alone, in one way."""
    if tap.others or tap.kind not in ("matrix", "window", "embedding"):
        return None
    if tap.kind == "embedding":
        return True, tap.transposed, tap.size
    height, width = tap.kernel
    d_in = tap.inputs.shape[1] * height * width if tap.kind == "window" else tap.inputs.shape[2]
    return False, tap.transposed, int(d_in)


def _joined(parts: list[Array]) -> Array:
    xp: Any = namespace(first=parts[0])
    return parts[0] if len(parts) == 1 else xp.concat(parts)


def gradient_grams(batches: Iterable[Taps], weights: frozenset[str], exchange: Exchange | None = None) -> Params:
    """Return, for each weight that has a tap, the mean over batches of G^T G, [d_in, d_in].

    G [d_out, d_in] is the gradient of a batch's mean loss.

    Args:
        batches: the taps of each batch.
        weights: names of weights, such as ``conv1.weight``; those of other weights are left out.
        exchange: if the batches are shared out among processes, how their sums are added.
    """
    sums: Params = {}
    batch_counts: dict[str, int] = {}
    for taps in batches:
        for name, tap in _of(weights, taps).items():
            gradient = batch_gradient({name: replace(tap, own_name=True, has_bias=False)})[name] / tap.inputs.shape[0]
            _add(sums, name, _gram(gradient))
            batch_counts[name] = batch_counts.get(name, 0) + 1
    if exchange is not None and sums:
        batch_counts = _total_counts(batch_counts, next(iter(sums.values())), exchange)
        sums = exchange.total(sums)
    return {name: total / batch_counts[name] for name, total in sums.items()}


def _of(weights: frozenset[str], taps: Taps) -> Taps:
    """Return the taps of these weights, by the names of the weights."""
    return {tap.weight_name(layer): tap for layer, tap in taps.items() if tap.weight_name(layer) in weights}


def _gram(rows: Array) -> Array:
    """Return F^T F of rows F [n, d]; if d is large, the block right of the diagonal is computed once and mirrored."""
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
    if name in sums:
        sums[name] += gram  # both were made here, so one may be overwritten
    else:
        sums[name] = gram


def _window_gram(images: Array, kernel: tuple[int, int]) -> Array:
    """Return the sum of a a^T over all patches a of images, [d, d] with d = channels x height x width of the kernel.

    Args:
        images: [samples, channels, height, width], with padding.
        kernel: the height and width of a patch; patches are one step apart.
    """
    xp: Any = namespace(images=images)
    samples, channels, rows, columns = images.shape
    height, width = kernel
    tall, wide = rows - height + 1, columns - width + 1
    by_row = xp.permute_dims(images, (2, 1, 0, 3))
    unrolled = xp.stack([by_row[:, :, :, j : j + wide] for j in range(width)], axis=2)
    a = xp.reshape(unrolled, (rows, channels * width, samples * wide))
    across = xp.matrix_transpose(a)  # once, since TensorFlow copies what it transposes
    blocks: list[list[Any]] = [[None] * height for _ in range(height)]
    for d in range(height):
        sums = _sums(a, across, d, height, tall) if d else _symmetric_sums(a, across, height, tall)
        for i, total in enumerate(sums):
            block = xp.reshape(total, (channels, width, channels, width))
            blocks[i][i + d] = block
            blocks[i + d][i] = xp.permute_dims(block, (2, 3, 0, 1))
    # [i, c, j, i', c', j'] to [c, i, j, c', i', j'], the order of a weight's flattened axes.
    stacked = xp.stack([xp.stack(row, axis=2) for row in blocks], axis=0)
    size = channels * height * width
    return xp.reshape(xp.permute_dims(stacked, (1, 0, 2, 4, 3, 5)), (size, size))


def _sums(a: Array, across: Array, d: int, height: int, tall: int) -> list[Array]:
    """Return, for each row i of the kernel below height - d, the sum of A_u A_{u+d}^T over u = i ... i + tall - 1.

    ``across`` has the A_u^T; of both, some channels may be left out.
    """
    xp: Any = namespace(a=a)
    z = xp.matmul(a[: a.shape[0] - d, :, :], across[d:, :, :])
    return [xp.sum(z[i : i + tall, :, :], axis=0) for i in range(height - d)]


def _symmetric_sums(a: Array, across: Array, height: int, tall: int) -> list[Array]:
    """Return ``_sums(a, across, 0, height, tall)``, with the lower left quarter mirrored instead of computed."""
    xp: Any = namespace(a=a)
    half = a.shape[1] // 2
    upper = _sums(a[:, :half, :], across, 0, height, tall)
    lower = _sums(a[:, half:, :], across[:, :, half:], 0, height, tall)
    return [
        xp.concat([above, xp.concat([xp.matrix_transpose(above[:, half:]), below], axis=1)])
        for above, below in zip(upper, lower, strict=True)
    ]
