"""How a forward pass used its parameters, read off PyTorch's autograd graph.

A parameter is a leaf of the graph. From it, a chain of views (transposes, slices, reshapes) leads to an operation that
also sees the samples, such as ``AddmmBackward0`` or ``ConvolutionBackward0``: a use of the parameter. What the
operation saved for its backward pass (``node._saved_mat1``, PyTorch's documented way to look at a node, in spite of the
underscore) are the inputs a of the use, and the gradient by the node's output is g. Layer classes do not matter, so
that attention, recurrent cells, functions, patched forwards and hooks are seen as what they compute.

| kind | operations | gradient of the parameter, for one sample |
| --- | --- | --- |
| matrix | addmm, mm, bmm, convolution | sum over positions of g a^T |
| scale | layer, group and batch norm | sum over positions of g * a, a the normalised inputs |
| embedding | embedding | sum over positions, by key |
| elementwise | additions, products, expansions, the biases of all others | sum of g * factor over what was broadcast |

Whatever else a parameter meets is reported as such: a ``Use`` is found or it is not, and nothing is guessed.

Convention: a use has R rows, each of which belongs to one sample as a whole: a is [R, positions, d_in], g is [R,
positions, d_out]. Which sample a row belongs to is not known here. An elementwise use has one row for each element.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional

from adapters.torch.layers import patches

__all__ = ["FUSED", "Graph", "Unknown", "Use", "Window", "graph_of", "pulled_back"]

# Operations that only move the entries of a tensor, or change their dtype.
VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        *("Alias", "Clone", "Contiguous", "Narrow", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "T"),
        *("SplitWithSizes", "ToCopy", "Transpose", "Unbind", "Unsqueeze", "UnsafeView", "View", "Squeeze"),
    )
) | {"SqueezeBackward1", "SqueezeBackward2", "UnsafeSplitBackward0", "MovedimBackward0", "UnflattenBackward0"}

# Operations that compute a whole recurrent layer, which PyTorch also computes step by step if it is told to.
FUSED = frozenset({"MkldnnRnnLayerBackward0", "CudnnRnnBackward0", "MiopenRnnBackward0"})

# Operations by which rows can move in another way for every batch.
ROUTING = frozenset(
    f"{name}Backward{number}"
    for name in ("Index", "IndexPut", "IndexSelect", "IndexAdd", "IndexCopy", "Gather", "Scatter", "ScatterAdd")
    for number in range(3)
) | {"MaskedSelectBackward0", "MaskedScatterBackward0", "TakeBackward0", "PackPaddedSequenceBackward0", "SortBackward0"}


class Window(NamedTuple):
    """The padded images of a convolution whose kernel slides by one, and the kernel's height and width."""

    images: Tensor
    kernel: tuple[int, int]


@dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
        name: of the parameter.
        kind: as the module's table has it.
        node: the operation; the gradient by its first output is g.
        key: what tells the use from others, in this pass and in later ones alike.
        inputs: returns a, [R, positions, d_in]; of an embedding, keys [R]; of an elementwise use, its factor.
        rows: from the gradient by the node's output to g, [R, positions, d_out].
        transposed: of a matrix, whether the parameter is stored as [d_in, d_out].
        groups: of a matrix.
        size: of an embedding, the number of its rows.
        window: of a convolution, what a Gram matrix without patches is computed from, if there is such.
        operand: of an elementwise use, where a chain of views ends; None without one.
    """

    name: str
    kind: Literal["matrix", "scale", "embedding", "elementwise"]
    node: Node
    key: tuple[Any, ...]
    inputs: Callable[[], Any]
    rows: Callable[[Tensor], Tensor]
    transposed: bool = False
    groups: int = 1
    size: int = 0
    window: Callable[[], Window] | None = None
    operand: GradientEdge | None = None


class Unknown(NamedTuple):
    """A use that no known operation explains.

    Attributes:
        name: of the parameter.
        operation: what PyTorch calls it.
    """

    name: str
    operation: str


@dataclass(frozen=True)
class Graph:
    """What a forward pass did with the parameters.

    Attributes:
        uses: of every parameter that it used.
        operations: the names of all nodes.
        consumers: by node, what its outputs go into: (node, slot, number of the output).
    """

    uses: Mapping[str, list[Use | Unknown]]
    operations: frozenset[str]
    consumers: Mapping[Node, list[tuple[Node, int, int]]] = field(repr=False)

    @property
    def is_fused(self) -> bool:
        """Whether a whole recurrent layer is one operation."""
        return bool(self.operations & FUSED)

    @property
    def routes(self) -> bool:
        """Whether rows may move in another way in the next batch."""
        return bool(self.operations & ROUTING)


def graph_of(
    result: Tensor, parameters: Mapping[str, Tensor], selections: frozenset[tuple[Any, ...]] = frozenset()
) -> Graph:
    """Return how the pass that made a result used these parameters.

    Args:
        result: what the network returned.
        parameters: by name; one that needs no gradient, or that was not used, has no uses.
        selections: keys of embeddings whose indices are no samples' (positions, for one): each selects rows of its
            weight, as a view does.
    """
    consumers: dict[Node, list[tuple[Node, int, int]]] = {}
    leaves: dict[Tensor, Node] = {}
    nodes: set[Node] = set()
    waiting = [] if result.grad_fn is None else [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for slot, (before, number) in enumerate(node.next_functions):
            if before is None:
                continue
            consumers.setdefault(before, []).append((node, slot, number))
            leaf = getattr(before, "variable", None)  # where a leaf's gradient gathers
            if leaf is None:
                waiting.append(before)
            else:
                leaves[leaf] = before
    reader = _Reader(consumers, selections, Counter())
    uses = {name: reader.uses(name, value, leaves[value]) for name, value in parameters.items() if value in leaves}
    return Graph(uses, frozenset(node.name() for node in nodes), consumers)


@dataclass(frozen=True)
class _Reader:
    """Follows a parameter from its leaf to its uses.

    Attributes:
        consumers: as of a ``Graph``.
        selections: as of ``graph_of``.
        counts: how many uses of a kind a parameter has had so far.
    """

    consumers: Mapping[Node, list[tuple[Node, int, int]]]
    selections: frozenset[tuple[Any, ...]]
    counts: Counter[tuple[Any, ...]]

    def uses(self, name: str, value: Tensor, leaf: Node) -> list[Use | Unknown]:
        found: list[Use | Unknown] = []
        waiting: list[tuple[Node, int | None, tuple[GradientEdge, ...]]] = [(leaf, None, ())]
        while waiting:
            before, output, chain = waiting.pop()
            for node, slot, number in self.consumers.get(before, ()):
                if output is not None and number != output:
                    continue
                operation = node.name()
                top = (*chain, GradientEdge(node, 0))
                if operation in VIEWS and sum(child is not None for child, _ in node.next_functions) == 1:
                    outputs = {number for _, _, number in self.consumers.get(node, ())}
                    waiting += [(node, number, (*chain, GradientEdge(node, number))) for number in outputs]
                elif operation == "ExpandBackward0" and self._is_for_bmm(node):
                    waiting.append((node, 0, top))
                else:
                    use = self._use(name, value, node, slot, chain)
                    if use.key[:2] in self.selections if isinstance(use, Use) else False:
                        waiting.append((node, 0, top))
                    else:
                        found.append(use)
        return found

    def _is_for_bmm(self, node: Node) -> bool:
        above = self.consumers.get(node, ())
        while len(above) == 1 and above[0][0].name() in VIEWS:
            above = self.consumers.get(above[0][0], ())
        return bool(above) and all(each.name() == "BmmBackward0" for each, _, _ in above)

    def _use(self, name: str, value: Tensor, node: Node, slot: int, chain: tuple[GradientEdge, ...]) -> Use | Unknown:
        operation = node.name()
        read = OPERATIONS.get((operation, slot))
        try:
            fields = None if read is None else read(node, value, chain)
        except RuntimeError:  # as autograd says that a saved tensor was overwritten or is gone
            fields = None
        if fields is None:
            return Unknown(name, operation)
        kind = (name, operation, slot)
        self.counts[kind] += 1
        return Use(name=name, node=node, key=(*kind, self.counts[kind]), **fields)


def pulled_back(edge: GradientEdge, parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient by a parameter of a chain of views, from that by what the views make of it.

    Of 1, 2, 3 ... instead of a gradient, a chain that moves entries and drops some makes each entry's position in what
    it ends in, and zero for what it drops.
    """
    (result,) = torch.autograd.grad(edge, parameter, gradient, retain_graph=True)
    return result.detach()


# Each function below reads one operation, with the parameter in one slot; None if it does not know this form of it.

Chain = tuple[GradientEdge, ...]
Fields = dict[str, Any] | None


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
        counts = torch.arange(1, size + 1) if size else torch.ones(shape[-1])
        positions = (counts if axis == -1 else counts[:, None]).expand(shape).to(value)
        mapped = pulled_back(chain[-1], value, positions) if chain else positions.reshape(value.shape)
        place[side] = mapped.reshape(value.shape[0], -1)
    covered = place["covered"] != 0
    if int(covered.sum()) != d_in * d_out or place["covered"].max() > 1:
        return None
    rows, columns = covered.any(1).nonzero()[:, 0], covered.any(0).nonzero()[:, 0]
    first, second = place["out"][covered].reshape(len(rows), -1), place["in"][covered].reshape(len(rows), -1)
    for transposed, down, across in ((False, first, second), (True, second, first)):
        is_grid = bool((down == torch.arange(1, len(rows) + 1).to(down)[:, None]).all()) and bool(
            (across == torch.arange(1, len(columns) + 1).to(down)).all()
        )
        if is_grid and _is_run(rows) and _is_run(columns):
            offset = int(rows[0]), int(columns[0])
            return (offset[::-1] if transposed else offset), transposed
    return None


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
    if chain or node._saved_scale_grad_by_freq or node._saved_sparse:
        return None
    keys, padding, width = node._saved_indices.detach().reshape(-1), int(node._saved_padding_idx), value.shape[1]

    def rows(g: Tensor) -> Tensor:
        g = _rows(width, g)
        # Autograd saves "no padding" as the integer -1, as it has no sign of it in some releases.
        return g if not 0 <= padding < value.shape[0] else g.masked_fill((keys == padding)[:, None, None], 0.0)

    return {"kind": "embedding", "inputs": lambda: keys, "rows": rows, "size": value.shape[0]}


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
