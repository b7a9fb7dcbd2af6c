"""What one operation of PyTorch's autograd graph computes with a parameter: the fields of a ``Use``.

What the operation saved for its backward pass (``node._saved_mat1``, PyTorch's documented way to look at a node, in
spite of the underscore) are the inputs a of the use, and the gradient by the node's output is g.

| kind | operations | gradient of the parameter, for one sample |
| --- | --- | --- |
| matrix | addmm, mm, bmm, convolution | sum over positions of g a^T |
| scale | layer, group and batch norm | sum over positions of g * a, a the normalised inputs |
| embedding | embedding | sum over positions, by key |
| elementwise | additions, products, expansions, the biases of all others | sum of g * factor over what was broadcast |

A function for each operation reads one node with the parameter in one slot, and returns None for a form of it that it
does not know. ``OPERATIONS`` has all of them.

Convention: as in ``graph.py``: a is [R, positions, d_in], g is [R, positions, d_out], for R rows.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional

from adapters.torch.layers import patches

__all__ = ["OPERATIONS", "Chain", "Fields", "Window", "pulled_back"]

# The views that lead from a parameter to an operation.
Chain = tuple[GradientEdge, ...]
# Those of a ``Use`` that tell what it computes; None of an operation in an unknown form.
Fields = dict[str, Any] | None


class Window(NamedTuple):
    """The padded images of a convolution whose kernel slides by one, and the kernel's height and width."""

    images: Tensor
    kernel: tuple[int, int]


def pulled_back(edge: GradientEdge, parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient by a parameter of a chain of views, from that by what the views make of it.

    Of 1, 2, 3 ... instead of a gradient, a chain that moves entries and drops some makes each entry's position in what
    it ends in, and zero for what it drops.
    """
    (result,) = torch.autograd.grad(edge, parameter, gradient, retain_graph=True)
    return result.detach()


def _rows(width: int, array: Tensor) -> Tensor:
    return array.reshape(-1, 1, width)


def _padded(before: int, after: int, array: Tensor) -> Tensor:
    return functional.pad(array, (before, after)) if before or after else array


def _matrix(inputs: Tensor, d_out: int, value: Tensor, chain: Chain, shape: tuple[int, ...], out_axis: int) -> Fields:
    """Return the fields of y = W a, W the operand of a shape, of which ``out_axis`` is the axis of outputs.

    Args:
        inputs: a, in rows [..., d_in].
        d_out: the number of outputs.
        value: the parameter.
        chain: the views from the parameter to the operand.
        shape: of the operand; its last two axes are those of inputs and outputs.
        out_axis: -1 or -2.
    """
    d_in = inputs.shape[-1]
    names = tuple(edge.node.name() for edge in chain if edge.node.name() != "ToCopyBackward0")
    if value.ndim == 2 and names in ((), ("TBackward0",), ("TransposeBackward0",)):
        offsets, transposed = (0, 0), bool(names) == (out_axis == -2)
    else:
        placed = _place_of_matrix(value, chain, shape, out_axis)
        if placed is None:
            return None
        offsets, transposed = placed
    whole = value.shape[0], prod(value.shape[1:])
    whole_out, whole_in = whole[::-1] if transposed else whole
    from_out, from_in = offsets
    sides = (from_in, whole_in - from_in - d_in), (from_out, whole_out - from_out - d_out)
    return {
        "kind": "matrix",
        "inputs": lambda: _padded(*sides[0], _rows(d_in, inputs)),
        "rows": lambda g: _padded(*sides[1], _rows(d_out, g)),
        "transposed": transposed,
    }


def _place_of_matrix(
    value: Tensor, chain: Chain, shape: tuple[int, ...], out_axis: int
) -> tuple[tuple[int, int], bool] | None:
    """Return where the operand lies in the parameter as a matrix, (output, input), and whether that is transposed."""
    if value.ndim < 2 or any(size != 1 for size in shape[:-2]):
        return None
    place: dict[str, Tensor] = {}
    d_out, d_in = (shape[out_axis], shape[-3 - out_axis])
    for side, axis, size in (("out", out_axis, d_out), ("in", -3 - out_axis, d_in), ("covered", -1, 0)):
        counts = _counted(size, value) if size else value.new_ones(shape[-1])
        positions = (counts if axis == -1 else counts[:, None]).expand(shape)
        mapped = pulled_back(chain[-1], value, positions) if chain else positions.reshape(value.shape)
        place[side] = mapped.reshape(value.shape[0], -1)
    covered = place["covered"] != 0
    if int(covered.sum()) != d_in * d_out or place["covered"].max() > 1:
        return None
    rows, columns = covered.any(1).nonzero()[:, 0], covered.any(0).nonzero()[:, 0]
    first, second = place["out"][covered].reshape(len(rows), -1), place["in"][covered].reshape(len(rows), -1)
    for transposed, down, across in ((False, first, second), (True, second, first)):
        counts_rows = bool((down == _counted(len(rows), down)[:, None]).all())
        is_grid = counts_rows and bool((across == _counted(len(columns), down)).all())
        if is_grid and _is_run(rows) and _is_run(columns):
            offset = int(rows[0]), int(columns[0])
            return (offset[::-1] if transposed else offset), transposed
    return None


def _counted(count: int, like: Tensor) -> Tensor:
    """Return 1, 2, 3 ... where another tensor is, in its dtype."""
    return torch.arange(1, count + 1, device=like.device).to(like.dtype)


def _is_run(indices: Tensor) -> bool:
    return int(indices[-1] - indices[0]) + 1 == len(indices)


def _mm(node: Any, value: Tensor, chain: Chain, *, first: str, second: str, slot: int) -> Fields:
    """Read ``first @ second``, with the parameter in the second place (slot 1) or in the first."""
    if getattr(node, "_saved_alpha", 1) != 1:
        return None
    if slot == 1:
        shape = tuple(getattr(node, f"_saved_{second}_sym_sizes"))
        return _matrix(getattr(node, f"_saved_{first}").detach(), shape[1], value, chain, shape, -1)
    shape = tuple(getattr(node, f"_saved_{first}_sym_sizes"))
    fields = _matrix(getattr(node, f"_saved_{second}").detach().T, shape[0], value, chain, shape, -2)
    if fields is not None:
        rows = fields["rows"]
        fields["rows"] = lambda g: rows(g.T)
    return fields


def _bmm(node: Any, value: Tensor, chain: Chain) -> Fields:
    """Read a product of stacks with one matrix in the second stack, or the same one many times."""
    inputs = node._saved_self.detach()
    expanded = bool(chain) and chain[-1].node.name() == "ExpandBackward0"
    if expanded:
        chain = chain[:-1]
    elif inputs.shape[0] != 1:
        return None
    d_in = inputs.shape[-1]
    if value.numel() % d_in:
        return None
    d_out = value.numel() // d_in
    return _matrix(inputs, d_out, value, chain, (d_in, d_out) if expanded else (1, d_in, d_out), -1)


def _convolution(node: Any, value: Tensor, chain: Chain) -> Fields:
    if node._saved_transposed or any(edge.node.name() != "ToCopyBackward0" for edge in chain):
        return None
    inputs, groups, axes = node._saved_input.detach(), int(node._saved_groups), value.ndim - 2
    # One number stands for all axes.
    padding, stride, dilation = (
        tuple(sizes) * (axes if len(sizes) == 1 else 1)
        for sizes in (node._saved_padding, node._saved_stride, node._saved_dilation)
    )
    kernel = tuple(value.shape[2:])
    if not len(padding) == len(stride) == len(dilation) == axes == inputs.ndim - 2:
        return None

    def around() -> Tensor:
        sides = [size for size in reversed(padding) for _ in range(2)]
        return functional.pad(inputs, sides) if any(sides) else inputs

    slides_by_one = axes == 2 and groups == 1 and set(stride) == set(dilation) == {1}
    return {
        "kind": "matrix",
        "inputs": lambda: patches(around(), kernel, stride, dilation),
        "rows": _channels_last,
        "groups": groups,
        "window": (lambda: Window(around(), (kernel[0], kernel[1]))) if slides_by_one else None,
    }


def _channels_last(array: Tensor) -> Tensor:
    """Return [R, C, ...] as [R, positions, C]."""
    return array.movedim(1, -1).reshape(array.shape[0], -1, array.shape[1])


def _embedding(node: Any, value: Tensor, chain: Chain) -> Fields:
    if chain or node._saved_scale_grad_by_freq:
        return None
    keys, padding, width = node._saved_indices.detach().reshape(-1), int(node._saved_padding_idx), value.shape[1]

    def rows(g: Tensor) -> Tensor:
        g = _rows(width, g)
        # Autograd saves "no padding" as the integer -1, as it has no sign of it in some releases.
        return g if not 0 <= padding < value.shape[0] else g.masked_fill((keys == padding)[:, None, None], 0.0)

    known = {"size": value.shape[0], "padding": padding if 0 <= padding < value.shape[0] else -1}
    return {"kind": "embedding", "inputs": lambda: keys, "rows": rows, **known}


def _layer_norm(node: Any, value: Tensor, chain: Chain) -> Fields:
    if chain:
        return None
    inputs, mean, inverse = (getattr(node, f"_saved_{name}").detach() for name in ("input", "result1", "result2"))
    rows = partial(_rows, value.numel())
    return {"kind": "scale", "inputs": lambda: rows((inputs - mean) * inverse).to(inputs.dtype), "rows": rows}


def _group_norm(node: Any, _: Tensor, chain: Chain) -> Fields:
    if chain:
        return None
    inputs, groups, eps = node._saved_input.detach(), int(node._saved_group), node._saved_eps
    normalised = partial(functional.group_norm, inputs, groups, eps=eps)
    return {"kind": "scale", "inputs": lambda: _channels_last(normalised()), "rows": _channels_last}


def _batch_norm(node: Any, _: Tensor, chain: Chain) -> Fields:
    if chain:
        return None
    # cuDNN's and MIOpen's nodes, of a GPU, have the other name.
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    inputs = node._saved_input.detach()
    if node._saved_training:
        mean, variance = torch.batch_norm_update_stats(inputs, None, None, 0.0)
    else:
        # Copies, because those of a batch norm that keeps none are overwritten by its next run.
        mean, variance = node._saved_running_mean.clone(), node._saved_running_var.clone()
    normalised = partial(functional.batch_norm, inputs, mean, variance, eps=eps)
    return {"kind": "scale", "inputs": lambda: _channels_last(normalised()), "rows": _channels_last}


def _added(node: Any, _: Tensor, chain: Chain, *, factor: float = 1.0, scaled: bool = False) -> Fields:
    """Read ``x + alpha p`` or ``x - alpha p``; ``scaled`` if the parameter is what alpha multiplies."""
    factor *= float(node._saved_alpha) if scaled else 1.0
    return _elementwise(chain, lambda: factor)


def _multiplied(node: Any, _: Tensor, chain: Chain, *, other: str) -> Fields:
    factor = getattr(node, f"_saved_{other}")
    return None if factor is None else _elementwise(chain, factor.detach)


def _bias(node: Any, _: Tensor, chain: Chain, *, channels: bool = False) -> Fields:
    """Read a bias, or what else is added or expanded; one of channels is on the second axis."""
    if getattr(node, "_saved_beta", 1) != 1:
        return None
    return _elementwise(chain, lambda: 1.0, _channels_last if channels else lambda g: g)


def _elementwise(chain: Chain, factor: Callable[[], Any], rows: Callable[[Tensor], Tensor] = lambda g: g) -> Fields:
    return {"kind": "elementwise", "inputs": factor, "rows": rows, "operand": chain[-1] if chain else None}


def _repeated(_: Any, value: Tensor, chain: Chain) -> Fields:
    """Read a vector repeated along a new axis: [d] to [n d], as instance norm has it."""
    return None if chain or value.ndim != 1 else _elementwise(chain, lambda: 1.0, partial(_rows, value.numel()))


# By the name of the node and the slot that leads to the parameter.
OPERATIONS: dict[tuple[str, int], Callable[[Any, Tensor, Chain], Fields]] = {
    ("AddmmBackward0", 0): _bias,
    ("AddmmBackward0", 1): partial(_mm, first="mat1", second="mat2", slot=0),
    ("AddmmBackward0", 2): partial(_mm, first="mat1", second="mat2", slot=1),
    ("MmBackward0", 0): partial(_mm, first="self", second="mat2", slot=0),
    ("MmBackward0", 1): partial(_mm, first="self", second="mat2", slot=1),
    ("BmmBackward0", 1): _bmm,
    ("ConvolutionBackward0", 1): _convolution,
    ("ConvolutionBackward0", 2): partial(_bias, channels=True),
    ("EmbeddingBackward0", 0): _embedding,
    ("NativeLayerNormBackward0", 1): _layer_norm,
    ("NativeLayerNormBackward0", 2): _bias,
    ("NativeGroupNormBackward0", 1): _group_norm,
    ("NativeGroupNormBackward0", 2): partial(_bias, channels=True),
    **{
        (f"{name}BatchNormBackward0", slot): read
        for name in ("Native", "Cudnn", "Miopen")
        for slot, read in ((1, _batch_norm), (2, partial(_bias, channels=True)))
    },
    ("AddBackward0", 0): _added,
    ("AddBackward0", 1): partial(_added, scaled=True),
    ("SubBackward0", 0): _added,
    ("SubBackward0", 1): partial(_added, factor=-1.0, scaled=True),
    ("MulBackward0", 0): partial(_multiplied, other="other"),
    ("MulBackward0", 1): partial(_multiplied, other="self"),
    ("ExpandBackward0", 0): _bias,
    ("RepeatBackward0", 0): _repeated,
}
