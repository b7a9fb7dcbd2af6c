"""Taps of any PyTorch network: the inputs and output gradients of each use that it makes of a parameter.

The uses are read off the autograd graph of a forward pass (``adapters/torch/graph.py``), so that layer classes do not
matter, and one backward pass stops at their outputs; no weight gradient is computed. No parameter is passed over in
silence: one that is used in a way that no known operation explains, or whose use mixes samples, has its per-sample
gradients computed by ``torch.func.vmap(grad)``, or by a loop over the samples where vmap cannot, with one warning that
names it.

Which sample a row of a use belongs to is found by trying, and not guessed from a length: a backward pass that begins
with the gradients of sample n multiplied by 2^k(n) has exactly 2^k(n) times the first one's rows wherever a row belongs
to sample n, because backward passes are linear and powers of two do not round. ``Layouts`` remembers the pattern, so
that later batches need no such pass, unless rows can move from batch to batch.

Convention: as in ``became_core.curvature.taps``. The network returns [samples, ...], and its first argument is the
samples: a tensor, or a tree of dicts, lists and tuples, whose tensors with that many rows belong to them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters.torch.graph import Graph, Unknown, Use, graph_of, pulled_back
from adapters.torch.layers import Statistics, constant_statistics
from became_core.curvature import Tap, Taps

__all__ = ["Layouts", "Names", "collect_inputs", "collect_taps", "matrices_of", "samples_of", "unfused"]

# Per-sample gradients that vmap computes at a time, in numbers.
CHUNK = 2**22

# Samples that one backward pass tells apart: their gradients are multiplied by 2^0 to 2^7.
CODES = 8

# All modules of a network by canonical name.
Names = Mapping[nn.Module, str]

Key = tuple[Any, ...]


class _Split(NamedTuple):
    """Rows [R] as [before, samples, after].

    Attributes:
        before: how many rows of one sample lie before the same ones of the next; 1 if samples come first.
        rows: how many rows one sample has.
    """

    before: int
    rows: int


@dataclass
class Layouts:
    """What has been found out of a network's uses of its parameters; it is filled while taps are collected.

    Attributes:
        splits: by use, and by the shape of a sample, how its rows may be arranged, as far as batches have told; empty
            for rows in no regular order.
        mixed: uses whose rows belong to no one sample.
        selections: embeddings that select rows of their weight for all samples alike, by parameter and operation.
        unfused: whether recurrent layers must be computed step by step, for their uses to be seen.
        warned: the parameters that a warning has named.
    """

    splits: dict[Key, frozenset[_Split]] = field(default_factory=dict)
    mixed: set[Key] = field(default_factory=set)
    selections: set[Key] = field(default_factory=set)
    unfused: bool = False
    warned: set[str] = field(default_factory=set)


# The rows of each sample: how [R] is split, or their numbers [samples, positions], R for none.
Arrangement = _Split | Tensor


@dataclass(frozen=True)
class _Forward:
    """A forward pass.

    Attributes:
        logits: [samples, ...].
        graph: what it did with the parameters.
        parameters: all that need a gradient, by canonical name.
        used: the batch statistics that were constants.
        shapes: those of the first sample and its logits: of batches in which they are equal, rows are arranged alike.
    """

    logits: Tensor
    graph: Graph
    parameters: Mapping[str, nn.Parameter]
    used: Statistics
    shapes: tuple[Any, ...]

    def gradients(self, edges: Sequence[GradientEdge], seed: Tensor) -> list[Tensor | None]:
        """Return the gradients of seed . logits at these places; None for one that the logits do not depend on."""
        if not edges:
            return []
        return list(torch.autograd.grad(self.logits, edges, seed, retain_graph=True, allow_unused=True))


def collect_taps(
    network: nn.Module,
    names: Names,
    arguments: tuple[Any, ...],
    cotangents: Callable[[Tensor], Iterable[Tensor]],
    *,
    layouts: Layouts | None = None,
    per_sample: bool = True,
) -> Iterator[Taps]:
    """Run one forward pass and a backward pass for each cotangent; yield the taps of each.

    Args:
        network: what runs, in the mode it is in; it returns logits [samples, ...].
        names: all its modules by canonical name.
        arguments: of the network, the first being the samples.
        cotangents: from logits to the gradients by them that backward passes begin with.
        layouts: what earlier batches of the same network told; the batch at hand is added to it.
        per_sample: whether per-sample gradients exist, batch statistics being constants; otherwise all rows are taken
            for those of one sample, and a parameter of which no layer's tap speaks has one gradient, the batch's.
    """
    layouts = Layouts() if layouts is None else layouts
    run = _forward(network, names, arguments, layouts, per_sample=per_sample)
    arranged: dict[Key, Arrangement] = {}
    if per_sample:
        run, arranged = _studied(run, layouts)
    plan = _plan(run, layouts, per_sample=per_sample)
    if per_sample:
        _warn_of(plan.others, run.graph, names, layouts)
    uses = [use for of_weight in plan.taps.values() for use in of_weight]
    edges: dict[Any, GradientEdge] = {use.node: GradientEdge(use.node, 0) for use in uses}
    edges |= {use.key: use.operand for use in uses if use.operand is not None}
    lone = [] if per_sample else [run.parameters[name] for name in plan.others]
    inputs: dict[Key, Any] = {}
    for seed in cotangents(run.logits.detach()):
        samples = len(seed) if per_sample else 1
        gradients = run.gradients([*edges.values(), *lone], seed)  # type: ignore[list-item]
        at = dict(zip(edges, gradients, strict=False))
        taps = {
            name: _tap([_tap_of(use, at, samples, arranged, inputs, run) for use in of_weight])
            for name, of_weight in plan.taps.items()
        }
        taps = {
            name: replace(tap, has_bias=name in plan.biased, own_name=name in run.parameters)
            for name, tap in taps.items()
        }
        rest: Iterable[Tensor | None] = gradients[len(edges) :]
        if per_sample and plan.others:
            rest = _per_sample_gradients(network, plan.others, run, arguments, seed)
        yield taps | {
            name: _lone_tap(torch.zeros_like(run.parameters[name]) if value is None else value, samples)
            for name, value in zip(plan.others, rest, strict=True)
        }


def collect_inputs(
    network: nn.Module, names: Names, arguments: tuple[Any, ...], weights: Iterable[str], layouts: Layouts | None = None
) -> Iterator[Taps]:
    """Run one forward pass; yield the taps of the inputs of these matrices, once for every time that one is used.

    Args:
        network: what runs.
        names: all its modules by canonical name.
        arguments: of the network.
        weights: names of parameters that ``matrices_of`` returned.
        layouts: what earlier batches of the same network told.
    """
    layouts = Layouts() if layouts is None else layouts
    graph = _forward(network, names, arguments, layouts, per_sample=False).graph
    passes: list[dict[str, Tap]] = []
    for name in weights:
        for index, use in enumerate(graph.uses.get(name, ())):
            if isinstance(use, Unknown):
                continue
            if index == len(passes):
                passes.append({})
            if use.window is not None:
                images, kernel = use.window()
                tap = Tap("window", images, images[:, :0, :0], kernel=kernel, own_name=True)
            else:
                rows = use.inputs()
                tap = Tap("matrix", rows, rows[:, :, :0], own_name=True, transposed=use.transposed)
            passes[index][name] = tap
    yield from passes


def matrices_of(
    network: nn.Module, names: Names, arguments: tuple[Any, ...], layouts: Layouts | None = None
) -> dict[str, bool]:
    """Return the parameters that are used as whole matrices alone, and whether they are stored as [d_in, d_out].

    A projector can protect such a parameter: all that it does to the network is to be multiplied with rows of inputs.

    Args:
        network: what runs, in evaluation mode.
        names: all its modules by canonical name.
        arguments: of the network, the first being at least two samples.
        layouts: what other batches of the same network told.
    """
    layouts = Layouts() if layouts is None else layouts
    run, arranged = _studied(_forward(network, names, arguments, layouts, per_sample=True), layouts)
    samples = len(run.logits)
    fewer = None
    matrices: dict[str, bool] = {}
    for name, uses in run.graph.uses.items():
        own = [use for use in uses if isinstance(use, Use) and use.kind == "matrix" and use.groups == 1]
        ways = {use.transposed for use in own}
        if len(own) < len(uses) or len(ways) != 1 or any(use.key in layouts.mixed for use in own):
            continue
        # What no gradient reaches, behind a branch that begins at zero, say, has not told whether its inputs are the
        # samples' rows. They are if there are fewer rows with fewer samples.
        if any(use.key not in arranged for use in own):
            fewer = fewer or _forward(
                network, names, samples_of(arguments, slice(1), samples), layouts, per_sample=True
            )
            if _row_count(uses) <= _row_count(fewer.graph.uses.get(name, ())):
                continue
        matrices[name] = ways.pop()
    return matrices


def samples_of(arguments: tuple[Any, ...], rows: slice, samples: int) -> tuple[Any, ...]:
    """Return a network's arguments with a slice of the samples.

    Args:
        arguments: the first is the samples; the others are left as they are.
        rows: which samples.
        samples: how many there are; a tensor with another length is no samples'.
    """

    def sliced(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return tree[rows] if tree.ndim and len(tree) == samples else tree
        if isinstance(tree, Mapping):
            return {key: sliced(value) for key, value in tree.items()}
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return type(tree)(*map(sliced, tree))
        return type(tree)(map(sliced, tree)) if isinstance(tree, tuple | list) else tree

    return sliced(arguments[0]), *arguments[1:]


def _row_count(uses: Sequence[Use | Unknown]) -> int:
    return sum(int(use.inputs().shape[0]) for use in uses if isinstance(use, Use))


def _forward(
    network: nn.Module, names: Names, arguments: tuple[Any, ...], layouts: Layouts, per_sample: bool
) -> _Forward:
    parameters = {name: parameter for parameter, name in _owners(names).items() if parameter.requires_grad}
    selections = frozenset(layouts.selections)
    statistics = constant_statistics(network) if per_sample else nullcontext(Statistics())
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), statistics as used:
        with unfused() if layouts.unfused else nullcontext():
            logits = network(*arguments)
        graph = graph_of(logits, parameters, selections)
        if graph.is_fused and per_sample and not layouts.unfused:
            layouts.unfused = True
            used.clear()
            with unfused():
                logits = network(*arguments)
            graph = graph_of(logits, parameters, selections)
    shapes = tuple(logits.shape[1:]), *_shapes(samples_of(arguments, slice(1), len(logits))[0])
    return _Forward(logits, graph, parameters, used, shapes)


def _shapes(tree: Any) -> tuple[Any, ...]:
    if isinstance(tree, Tensor):
        return (tuple(tree.shape),)
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    return tuple(map(_shapes, parts))


@contextmanager
def unfused() -> Iterator[None]:
    """Let PyTorch compute recurrent layers step by step, by operations that have all derivatives."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN", UserWarning)  # for Intel's GPUs alone
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _owners(names: Names) -> dict[nn.Parameter, str]:
    """Return the canonical name of each parameter: that in the first module that has it."""
    owners: dict[nn.Parameter, str] = {}
    for module, layer in names.items():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, f"{layer}.{name}" if layer else name)
    return owners


# Which sample a row belongs to.


def _studied(run: _Forward, layouts: Layouts) -> tuple[_Forward, dict[Key, Arrangement]]:
    """Return the pass and how the rows of its uses are arranged; uses that mix samples go into the layouts.

    An embedding that mixes samples may look up what is no sample's, such as positions. It then selects rows of its
    weight, and what it is a part of is the use.
    """
    while True:
        uses = [use for of_parameter in run.graph.uses.values() for use in of_parameter if isinstance(use, Use)]
        arranged = _arranged_uses(run, uses, layouts)
        lookups = {use.key[:2] for use in uses if use.kind == "embedding" and use.key in layouts.mixed}
        if lookups <= layouts.selections:
            return run, arranged
        layouts.selections |= lookups
        run = replace(run, graph=graph_of(run.logits, run.parameters, frozenset(layouts.selections)))


def _arranged_uses(run: _Forward, uses: Sequence[Use], layouts: Layouts) -> dict[Key, Arrangement]:
    samples = len(run.logits)
    known = {use.key: layouts.splits.get((run.shapes, use.key), ()) for use in uses if use.key not in layouts.mixed}
    if samples > 1 and not run.graph.routes and all(len(ways) == 1 for ways in known.values()):
        return {key: next(iter(ways)) for key, ways in known.items()}
    nodes = list(dict.fromkeys(use.node for use in uses))
    edges = [GradientEdge(node, 0) for node in nodes]
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(run.logits.shape, generator=generator).add_(3).to(run.logits)
    plain = dict(zip(nodes, run.gradients(edges, seed), strict=True))
    coded: list[Mapping[Any, Tensor | None]] = []
    for place in range(10):
        if CODES**place >= samples:
            break
        exponents = torch.arange(samples) // CODES**place % CODES
        factors = torch.pow(2.0, exponents).to(seed).reshape(-1, *[1] * (seed.ndim - 1))
        coded.append(dict(zip(nodes, run.gradients(edges, seed * factors), strict=True)))
    arranged: dict[Key, Arrangement] = {}
    for use in uses:
        of_row = _samples_of_rows(use, plain[use.node], [each[use.node] for each in coded])
        if of_row is None:
            layouts.mixed.add(use.key)
            continue
        ways = _splits(of_row, samples)
        if samples > 1 and bool((of_row >= 0).any()):
            key = run.shapes, use.key
            layouts.splits[key] = layouts.splits.get(key, ways) & ways
        if ways and (samples == 1 or bool((of_row >= 0).any())):
            arranged[use.key] = min(ways)
        elif not ways:
            arranged[use.key] = _numbers_by_sample(of_row, samples)
    return arranged


def _samples_of_rows(use: Use, plain: Tensor | None, coded: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sample that each row of a use belongs to, -1 where no gradient tells; None if one belongs to several.

    Args:
        use: the use.
        plain: the gradient by its node's output.
        coded: those with the gradients of sample n multiplied by 2^digit, a digit of n to the base ``CODES`` each.
    """
    if plain is None:
        return torch.zeros(0, dtype=torch.int64)
    first = _flat_rows(use, plain)
    energy = first.square().sum(1)
    told = energy > 0
    of_row = torch.where(told, 0, -1)
    for place, gradient in enumerate(coded):
        assert gradient is not None
        second = _flat_rows(use, gradient)
        if bool(second[~told].any()):
            return None
        ratio = (first * second).sum(1)[told] / energy[told]
        digit = ratio.clamp(min=0.25).log2().round()
        apart = (second[told] - first[told] * torch.pow(2.0, digit)[:, None]).square().sum(1)
        if bool((apart > 1e-5 * energy[told] * ratio.square()).any()) or bool(((digit < 0) | (digit >= CODES)).any()):
            return None
        of_row[told] += digit.to(torch.int64) * CODES**place
    return of_row


def _flat_rows(use: Use, gradient: Tensor) -> Tensor:
    rows = use.rows(gradient)
    rows = rows.reshape(-1, 1) if use.kind == "elementwise" else rows.flatten(1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _splits(of_row: Tensor, samples: int) -> frozenset[_Split]:
    """Return all regular arrangements that agree with what is known of the rows' samples."""
    if len(of_row) % samples:
        return frozenset()
    rows = len(of_row) // samples
    told = (of_row >= 0).nonzero()[:, 0]
    owners = of_row[told]
    ways = set()
    for before in _divisors(rows):
        after = rows // before
        if bool((told // after % samples == owners).all()):
            ways.add(_Split(before, rows))
    return frozenset(ways)


def _divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def _numbers_by_sample(of_row: Tensor, samples: int) -> Tensor:
    """Return the numbers of each sample's rows, [samples, positions], filled up with the number of rows."""
    numbers = [(of_row == sample).nonzero()[:, 0] for sample in range(samples)]
    return nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=len(of_row))


def _by_sample(rows: Tensor, arrangement: Arrangement, samples: int) -> Tensor:
    """Return [R, ...] as [samples, positions, ...]."""
    if isinstance(arrangement, Tensor):
        nothing = rows.new_zeros((1, *rows.shape[1:]))
        return torch.cat([rows, nothing])[arrangement]
    if samples == 1 or arrangement.before == 1:
        return rows.reshape(samples, len(rows) // samples, *rows.shape[1:])
    split = rows.reshape(arrangement.before, samples, -1, *rows.shape[1:]).movedim(1, 0)
    return split.reshape(samples, len(rows) // samples, *rows.shape[1:])


# From uses to taps.


class _Plan(NamedTuple):
    """Which taps a pass has.

    Attributes:
        taps: by the tap's name, the uses of its weight.
        biased: the taps whose layers have a bias with the same output gradients.
        others: the parameters that no tap explains.
    """

    taps: dict[str, list[Use]]
    biased: frozenset[str]
    others: list[str]


def _plan(run: _Forward, layouts: Layouts, *, per_sample: bool) -> _Plan:
    explained: dict[str, list[Use]] = {}
    for name, uses in run.graph.uses.items():
        own = [use for use in uses if isinstance(use, Use) and use.key not in layouts.mixed]
        kinds = {use.kind for use in own}
        if len(own) == len(uses) and (kinds == {"elementwise"} or "elementwise" not in kinds):
            explained[name] = own
    taps: dict[str, list[Use]] = {}
    biased: set[str] = set()
    for name, own in explained.items():
        layer, _, last = name.rpartition(".")
        bias = explained.get(f"{layer}.bias")
        if layer and last == "weight" and own[0].kind in ("matrix", "scale") and not own[0].transposed:
            taps[layer] = own
            biased |= {layer} if bias and _have_common_outputs(own, bias, run.graph) else set()
    for name, own in explained.items():
        layer, _, last = name.rpartition(".")
        is_served = (last == "bias" and layer in biased) or (last == "weight" and layer in taps)
        # The batch's gradient of an elementwise use is autograd's own.
        if not is_served and (per_sample or own[0].kind != "elementwise"):
            taps[name] = own
    served = {f"{layer}.weight" for layer in taps} | {f"{layer}.bias" for layer in biased} | taps.keys()
    return _Plan(taps, frozenset(biased), [name for name in run.graph.uses if name not in served])


def _have_common_outputs(weights: Sequence[Use], biases: Sequence[Use], graph: Graph) -> bool:
    """Whether every use of a weight has a bias added to its output, and to nothing else."""
    if len(weights) != len(biases):
        return False
    nodes = {use.node for use in biases}
    for use in weights:
        node = use.node
        if node in nodes:
            continue
        above = graph.consumers.get(node, ())
        while len(above) == 1 and above[0][0].name() in ("ViewBackward0", "UnsafeViewBackward0"):
            above = graph.consumers.get(above[0][0], ())
        if len(above) != 1 or above[0][0] not in nodes or above[0][0].name() != "AddBackward0":
            return False
    return True


def _tap_of(
    use: Use,
    at: Mapping[Any, Tensor | None],
    samples: int,
    arranged: Mapping[Key, Arrangement],
    inputs: dict[Key, Any],
    run: _Forward,
) -> Tap | None:
    """Return the tap of one use; None if the result does not depend on it.

    Args:
        use: the use.
        at: the gradients by the outputs of nodes, and by what uses have for operands.
        samples: how many there are.
        arranged: how the rows of uses are arranged.
        inputs: of uses whose taps have been made for other cotangents of the same pass.
        run: the forward pass.
    """
    gradient = at[use.node]
    if gradient is None:
        return None
    arrangement = arranged.get(use.key, _Split(1, 0))
    if use.kind == "elementwise":
        by_operand = run.parameters[use.name] if use.operand is None else at[use.key]
        assert by_operand is not None
        total = _elementwise_gradient(use, gradient, arrangement, samples, by_operand.shape)
        if use.operand is not None:  # one pass back through the views for each sample
            parameter, edge = run.parameters[use.name], use.operand
            total = torch.stack([pulled_back(edge, parameter, each) for each in total])
        return _lone_tap(total, samples)
    g = _by_sample(use.rows(gradient), arrangement, samples)
    if use.key not in inputs:
        a = _by_sample(use.inputs(), arrangement, samples)
        inputs[use.key] = a if use.kind == "embedding" else a.flatten(1, 2)
    return Tap(
        use.kind,
        inputs[use.key],
        g.flatten(1, 2),
        groups=use.groups,
        size=use.size,
        transposed=use.transposed,
    )


def _tap(uses: Sequence[Tap | None]) -> Tap:
    """Return all uses of one weight as one tap: those of one kind have their positions in a row."""
    alike: dict[tuple[Any, ...], list[Tap]] = {}
    for tap in uses:
        if tap is not None:
            alike.setdefault((tap.kind, tap.transposed, tap.groups), []).append(tap)
    first, *others = (_in_a_row(taps) for taps in alike.values())
    return replace(first, others=tuple(others))


def _in_a_row(taps: Sequence[Tap]) -> Tap:
    if len(taps) == 1:
        return taps[0]
    if taps[0].kind == "gradient":
        return replace(taps[0], inputs=torch.stack([tap.inputs for tap in taps]).sum(0))
    inputs, gradients = (torch.cat([getattr(tap, side) for tap in taps], 1) for side in ("inputs", "output_gradients"))
    return replace(taps[0], inputs=inputs, output_gradients=gradients)


def _elementwise_gradient(
    use: Use, gradient: Tensor, arrangement: Arrangement, samples: int, shape: torch.Size
) -> Tensor:
    """Return each sample's gradient by the operand of an elementwise use, [samples, *shape]."""
    parts = use.rows(gradient * use.inputs())
    size = shape.numel()
    by_sample = _by_sample(parts.reshape(-1), arrangement, samples)
    if len(shape) == 1 and parts.shape[-1] == size and isinstance(arrangement, _Split) and arrangement.before == 1:
        return by_sample.reshape(samples, -1, size).sum(1)
    entries = torch.arange(size, device=parts.device).reshape(shape).expand(parts.shape).reshape(-1)
    total = parts.new_zeros(samples, size).scatter_add_(1, _by_sample(entries, arrangement, samples), by_sample)
    return total.reshape(samples, *shape)


def _lone_tap(gradient: Tensor, samples: int) -> Tap:
    flat = gradient.reshape(samples, 1, -1)
    return Tap("gradient", flat, torch.ones_like(flat[..., :1]))


# Parameters that no known operation explains.


def _warn_of(others: Sequence[str], graph: Graph, names: Names, layouts: Layouts) -> None:
    """Warn once of the parameters whose per-sample gradients take longer."""
    new = [name for name in others if name not in layouts.warned]
    if not new:
        return
    layouts.warned |= set(new)
    classes = {layer: type(module).__name__ for module, layer in names.items()}
    parts = []
    for name in new:
        layer = name.rpartition(".")[0]
        where = f"the layer '{layer}'" if layer else "the network itself"
        how = sorted({use.operation for use in graph.uses[name] if isinstance(use, Unknown)})
        by = f", by {' and '.join(operation.removesuffix('Backward0') for operation in how)}" if how else ""
        parts.append(f"'{name}' (in {where}, a {classes[layer]}{by})")
    warnings.warn(
        f"taps do not know how these parameters are used: {', '.join(parts)}; their per-sample gradients are computed "
        "sample by sample, which is exact but slower.",
        stacklevel=3,
    )


def _per_sample_gradients(
    network: nn.Module, others: Sequence[str], run: _Forward, arguments: tuple[Any, ...], seed: Tensor
) -> Iterator[Tensor]:
    """Return for each of these parameters the gradients of each sample's seed . logits, [samples, *shape]."""
    parameters = [run.parameters[name] for name in others]
    raw = {parameter: name for name, parameter in network.named_parameters()}
    theta = {raw[parameter]: parameter.detach() for parameter in parameters}

    def one(theta: dict[str, Tensor], sample: Tensor, at_logits: Tensor) -> Tensor:
        with constant_statistics(network, run.used):
            logits: Tensor = torch.func.functional_call(network, theta, (sample[None], *arguments[1:]))
        return (logits[0] * at_logits).sum()

    size = max(1, CHUNK // sum(value.numel() for value in theta.values()))
    try:
        # No graph of the others' parameters; and vmap knows no other kernel of attention.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            gradients = torch.func.vmap(torch.func.grad(one), (None, 0, 0), chunk_size=size)(theta, arguments[0], seed)
        return iter([gradients[raw[parameter]] for parameter in parameters])
    except Exception:
        return _by_loop(network, parameters, run, arguments, seed)


def _by_loop(
    network: nn.Module, parameters: Sequence[nn.Parameter], run: _Forward, arguments: tuple[Any, ...], seed: Tensor
) -> Iterator[Tensor]:
    """Return the same by a pass for each sample."""
    rows: list[tuple[Tensor, ...]] = []
    for sample in range(len(seed)):
        alone = samples_of(arguments, slice(sample, sample + 1), len(seed))
        with torch.enable_grad(), constant_statistics(network, run.used):
            logits = network(*alone)
        gradients = torch.autograd.grad(logits, parameters, seed[sample : sample + 1], allow_unused=True)
        filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))
        rows.append(tuple(filled))
    return (torch.stack(of_parameter) for of_parameter in zip(*rows, strict=True))
