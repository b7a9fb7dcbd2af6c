"""How a forward pass used its parameters, read off PyTorch's autograd graph.

A parameter is a leaf of the graph. From it, a chain of views (transposes, slices, reshapes) leads to an operation that
also sees the samples, such as ``AddmmBackward0`` or ``ConvolutionBackward0``: a use of the parameter. Its inputs a and
its output gradients g are read off the operation (``operations.py``). Layer classes do not matter, so that attention,
recurrent cells, functions, patched forwards and hooks are seen as what they compute.

Whatever else a parameter meets is reported as such: a ``Use`` is found or it is not, and nothing is guessed.

Convention: a use has R rows, each of which belongs to one sample as a whole: a is [R, positions, d_in], g is [R,
positions, d_out]. Which sample a row belongs to is not known here. An elementwise use has one row for each element.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from adapters.torch.operations import OPERATIONS, Chain, Window

__all__ = ["FUSED", "Graph", "Unknown", "Use", "graph_of"]

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

# Operations that cut rows where their arguments say, which may be elsewhere in every batch.
CUTS = frozenset(
    f"{name}Backward{number}" for name in ("Slice", "Split", "SplitWithSizes", "Narrow") for number in (0, 1)
)

# Operations by which rows can move in another way for every batch.
ROUTING = frozenset(
    f"{name}Backward{number}"
    for name in ("Index", "IndexPut", "IndexSelect", "IndexAdd", "IndexCopy", "Gather", "Scatter", "ScatterAdd")
    for number in range(3)
) | {"MaskedSelectBackward0", "MaskedScatterBackward0", "TakeBackward0", "PackPaddedSequenceBackward0", "SortBackward0"}


@dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
        name: of the parameter.
        kind: as the table of ``operations.py`` has it.
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
    padding: int = -1
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
    cuts: tuple[Any, ...] = ()

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
        parameters: by name; one that needs no gradient, was not used or has no entry has no uses.
        selections: keys of embeddings whose indices are no samples' (positions, for one): each selects rows of its
            weight, as a view does.
    """
    consumers: dict[Node, list[tuple[Node, int, int]]] = {}
    leaves: dict[Tensor, Node] = {}
    nodes: set[Node] = set()
    cuts: list[Any] = []
    waiting = [] if result.grad_fn is None else [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in nodes:
            continue
        nodes.add(node)
        if node.name() in CUTS:
            cuts.append(
                [getattr(node, f"_saved_{name}", None) for name in ("start", "end", "split_size", "split_sizes")]
            )
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
    used = {name: value for name, value in parameters.items() if value in leaves and value.numel()}
    uses = {name: reader.uses(name, value, leaves[value]) for name, value in used.items()}
    return Graph(uses, frozenset(node.name() for node in nodes), consumers, tuple(str(cut) for cut in cuts))


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
        waiting: list[tuple[Node, int | None, Chain]] = [(leaf, None, ())]
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

    def _use(self, name: str, value: Tensor, node: Node, slot: int, chain: Chain) -> Use | Unknown:
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
