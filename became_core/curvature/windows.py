"""The Gram matrix of all patches of images, without cutting a patch: sums over windows that slide by one.

Patches at (p, q) hold x[c, p + i, q + j], so their Gram matrix is, for each pair of places in the kernel,

    G[(c, i, j), (c', i', j')] = sum_{n, p, q} x[c, p + i, q + j] x[c', p + i', q + j']

Along the height only d = i' - i matters, and where the window lies: with A_u the rows u of all images, unrolled along
the width, Z_d(u) = A_u A_{u+d}^T is summed over u = i .. i + P - 1 for all i alike. That is a kernel's height times
less arithmetic than the product of the patches' matrix with itself, and its height times less memory. Z_0 is symmetric,
and a quarter of it is the mirror image of another.
"""

from typing import Any

from became_core.arrays import Array, namespace

__all__ = ["window_gram"]


def window_gram(images: Array, kernel: tuple[int, int]) -> Array:
    """Return the sum of a a^T over all patches a of images, [d, d] with d = channels x height x width of the kernel.

    Args:
        images: [samples, channels, height, width], padded already.
        kernel: height and width of the windows, which slide by one.
    """
    xp: Any = namespace(images=images)
    samples, channels, rows, columns = images.shape
    height, width = kernel
    tall, wide = rows - height + 1, columns - width + 1
    by_row = xp.permute_dims(images, (2, 1, 0, 3))
    unrolled = xp.stack([by_row[:, :, :, j : j + wide] for j in range(width)], axis=2)
    a = xp.reshape(unrolled, (rows, channels * width, samples * wide))
    blocks: list[list[Any]] = [[None] * height for _ in range(height)]
    for d in range(height):
        for i, total in enumerate(_symmetric_sums(a, height, tall) if d == 0 else _sums(a, a, d, height, tall)):
            block = xp.reshape(total, (channels, width, channels, width))
            blocks[i][i + d] = block
            blocks[i + d][i] = xp.permute_dims(block, (2, 3, 0, 1))
    # [i, c, j, i', c', j'] to [c, i, j, c', i', j'], the order of a weight's flattened axes.
    every = xp.stack([xp.stack(row, axis=2) for row in blocks], axis=0)
    size = channels * height * width
    return xp.reshape(xp.permute_dims(every, (1, 0, 2, 4, 3, 5)), (size, size))


def _sums(a: Array, b: Array, d: int, height: int, tall: int) -> list[Array]:
    """Return, for each place i of a row in the kernel, the sum of A_u B_{u+d}^T over u = i .. i + tall - 1."""
    xp: Any = namespace(a=a)
    z = xp.matmul(a[: a.shape[0] - d, :, :], xp.matrix_transpose(b[d:, :, :]))
    return [xp.sum(z[i : i + tall, :, :], axis=0) for i in range(height - d)]


def _symmetric_sums(a: Array, height: int, tall: int) -> list[Array]:
    """Return ``_sums(a, a, 0, height, tall)``, without the products of the lower half with the upper one."""
    xp: Any = namespace(a=a)
    half = a.shape[1] // 2
    upper = _sums(a[:, :half, :], a, 0, height, tall)
    lower = _sums(a[:, half:, :], a[:, half:, :], 0, height, tall)
    return [
        xp.concat([above, xp.concat([xp.matrix_transpose(above[:, half:]), below], axis=1)])
        for above, below in zip(upper, lower, strict=True)
    ]
