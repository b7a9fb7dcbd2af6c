"""Taps of any PyTorch network: the inputs and output gradients of each use that it makes of a parameter.

The uses are read off the autograd graph of a forward pass (``adapters/torch/graph.py``), so that layer classes do not
matter, and one backward pass stops at their outputs; no weight gradient is computed. No parameter is passed over in
silence: one that is used in a way that no known operation explains, or whose use mixes samples, has its per-sample
gradients computed by ``torch.func.vmap(grad)``, or by a loop over the samples where vmap cannot, with one warning that
names it.

Which sample a row of a use belongs to is found by trying (``adapters/torch/rows.py``).

Convention: as in ``became_core.curvature.taps``. The network returns [samples, ...], and its first argument is the
samples: a tensor, or a tree of dicts, lists and tuples, whose tensors with that many rows belong to them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters.torch.batches import samples_of, tensors_of
from adapters.torch.graph import Graph, Unknown, Use, graph_of
from adapters.torch.layers import Statistics, constant_statistics, gradients_of, outputs_at
from adapters.torch.operations import Window, pulled_back
from adapters.torch.rows import Arrangement, Forward, Key, Layouts, Split, by_sample, studied
from became_core.curvature import Tap, Taps, inputs_of_uses, joined_uses

__all__ = [
    "Layouts",
    "Names",
    "as_written",
    "collect_inputs",
    "collect_taps",
    "matrices_of",
    "owners_of",
    "unfused",
    "ways_of",
]

# Per-sample gradients that vmap computes at a time, in numbers.
CHUNK = 2**22

# All modules of a network by canonical name.
Names = Mapping[nn.Module, str]


def collect_taps(
    network: nn.Module,
    names: Names,
    arguments: tuple[Any, ...],
    cotangents: Callable[[Tensor], Iterable[Tensor]],
    *,
    layouts: Layouts | None = None,
    per_sample: bool = True,
    windows: bool = False,
) -> Iterator[Taps]:
    """Run one forward pass and a backward pass for each cotangent; yield the taps of each.

    Args:
        network: what runs, in the mode it is in; it returns logits [samples, ...].
        names: all its modules by canonical name.
        arguments: of the network, the first being the samples.
        cotangents: from logits to the gradients by them that backward passes begin with.
        layouts: what earlier batches of the same network told; the batch at hand is added to it.
        per_sample: whether per-sample gradients exist, batch statistics being constants; otherwise taps are
            right as sums over all samples alone, and a parameter of which no layer's tap speaks has one gradient.
        windows: whether convolutions whose kernels slide by one have their images too, for Gram matrices.
    """
    layouts = Layouts() if layouts is None else layouts
    run = _forward(network, names, arguments, layouts, per_sample=per_sample)
    arranged: dict[Key, Arrangement] = {}
    if per_sample:
        run, arranged = studied(run, layouts)
    plan = _plan(run, layouts, per_sample=per_sample)
    if per_sample:
        _warn_of(plan.others, run.graph, names, layouts)
    uses = [use for of_weight in plan.taps.values() for use in of_weight]
    edges: dict[Any, GradientEdge] = {use.node: GradientEdge(use.node, 0) for use in uses}
    edges |= {use.key: use.operand for use in uses if use.operand is not None}
    lone = [] if per_sample else [run.parameters[name] for name in plan.others]
    inputs: dict[Key, tuple[Tensor, Window | None]] = {}
    joined: dict[str, tuple[Tensor, ...]] = {}
    for seed in cotangents(run.logits.detach()):
        samples = len(seed)
        gradients = run.gradients([*edges.values(), *lone], seed)  # type: ignore[list-item]
        at = dict(zip(edges, gradients, strict=False))
        of_uses = {
            name: [_tap_of(use, at, samples, arranged, inputs, run, windows) for use in of_weight]
            for name, of_weight in plan.taps.items()
        }
        taps = {
            name: joined_uses([tap for tap in own if tap is not None], joined.get(name))
            for name, own in of_uses.items()
        }
        joined = joined or inputs_of_uses(taps)
        taps = {
            name: replace(tap, has_bias=name in plan.biased, own_name=name in run.parameters)
            for name, tap in taps.items()
        }
        rest: Iterable[Tensor | None] = gradients[len(edges) :]
        if per_sample and plan.others:
            rest = _per_sample_gradients(network, plan.others, run, arguments, seed)
        yield taps | {
            name: _lone_tap(
                torch.zeros_like(run.parameters[name]) if value is None else value, len(seed) if per_sample else 1
            )
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
            layer, _, last = name.rpartition(".")
            is_layers = bool(layer) and last == "weight"
            if use.window is not None:
                images, kernel = use.window()
                tap = Tap("window", images, images[:, :0, :0], kernel=kernel, own_name=not is_layers)
            elif use.kind == "embedding":
                keys = use.inputs()[:, None]
                looked_up = torch.ones((*keys.shape, 1), device=keys.device)  # in the place of gradients
                tap = Tap("embedding", keys, looked_up, size=use.size, padding=use.padding, own_name=not is_layers)
            else:
                rows = use.inputs()
                tap = Tap("matrix", rows, rows[:, :, :0], own_name=not is_layers, transposed=use.transposed)
            passes[index][layer if is_layers else name] = tap
    yield from passes


def matrices_of(
    network: nn.Module, names: Names, arguments: tuple[Any, ...], layouts: Layouts | None = None
) -> dict[str, bool]:
    """Return the parameters that ``ways_of`` has as matrices, of the same arguments."""
    ways = ways_of(network, names, arguments, layouts)
    return {name: way for name, way in ways.items() if way is not None}


def ways_of(
    network: nn.Module, names: Names, arguments: tuple[Any, ...], layouts: Layouts | None = None
) -> dict[str, bool | None]:
    """Return the parameters that are used as whole matrices alone, and whether they are stored as [d_in, d_out].

    A projector can protect such a parameter: all that it does to the network is to be multiplied with rows of inputs,
    those of an embedding [size, d_out] being one-hot vectors. Of a parameter that is used otherwise there is None, and
    one of which it cannot be told is left out.

    Args:
        network: what runs, in evaluation mode.
        names: all its modules by canonical name.
        arguments: of the network, the first being at least two samples.
        layouts: what other batches of the same network told.
    """
    layouts = Layouts() if layouts is None else layouts
    run, arranged = studied(_forward(network, names, arguments, layouts, per_sample=True), layouts)
    samples = len(run.logits)
    fewer = None
    found: dict[str, bool | None] = {}
    for name, uses in run.graph.uses.items():
        kinds = {use.kind for use in uses if isinstance(use, Use)}
        own = [use for use in uses if isinstance(use, Use) and use.kind in ("matrix", "embedding") and use.groups == 1]
        ways = {use.transposed or use.kind == "embedding" for use in own}
        if len(kinds) != 1 or len(own) < len(uses) or len(ways) != 1:
            found[name] = None
            continue
        if any(use.key in layouts.mixed for use in own):
            continue
        # What no gradient reaches, behind a branch that begins at zero, say, has not told whether its inputs are the
        # samples' rows. They are if there are fewer rows with fewer samples.
        if any(use.key not in arranged for use in own):
            fewer = fewer or _forward(
                network, names, samples_of(arguments, slice(1), samples), layouts, per_sample=True
            )
            if _row_count(uses) <= _row_count(fewer.graph.uses.get(name, ())):
                continue
        found[name] = ways.pop()
    return found


def _row_count(uses: Sequence[Use | Unknown]) -> int:
    return sum(int(use.inputs().shape[0]) for use in uses if isinstance(use, Use))


def _forward(
    network: nn.Module, names: Names, arguments: tuple[Any, ...], layouts: Layouts, per_sample: bool
) -> Forward:
    parameters = {name: parameter for parameter, name in owners_of(names).items() if parameter.requires_grad}
    selections = frozenset(layouts.selections)
    statistics = constant_statistics(network) if per_sample else nullcontext(Statistics())
    with torch.enable_grad(), as_written(compiled=layouts.compiled), statistics as used:
        with unfused() if layouts.unfused else nullcontext():
            logits = network(*arguments)
        graph = graph_of(logits, parameters, selections)
        if graph.is_fused and per_sample and not layouts.unfused:
            layouts.unfused = True
            used.clear()
            with unfused():
                logits = network(*arguments)
            graph = graph_of(logits, parameters, selections)
    first = samples_of(arguments, slice(1), len(logits))[0]
    shapes = tuple(logits.shape[1:]), *(tuple(tensor.shape) for tensor in tensors_of(first)), graph.cuts
    return Forward(logits, graph, parameters, used, shapes)


def as_written(*, compiled: bool) -> AbstractContextManager[Any]:
    """Let compiled modules run as they are written, within it.

    Args:
        compiled: whether there may be any. PyTorch loads its compiler to be told so, which takes a second or two.
    """
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def unfused() -> Iterator[None]:
    """Let PyTorch compute recurrent layers step by step, by operations that have all derivatives."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN", UserWarning)  # for Intel's GPUs alone
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def owners_of(names: Names) -> dict[nn.Parameter, str]:
    """Return the canonical name of each parameter: that in the first module that has it."""
    owners: dict[nn.Parameter, str] = {}
    for module, layer in names.items():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, f"{layer}.{name}" if layer else name)
    return owners


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


def _plan(run: Forward, layouts: Layouts, *, per_sample: bool) -> _Plan:
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
    inputs: dict[Key, tuple[Tensor, Window | None]],
    run: Forward,
    windows: bool,
) -> Tap | None:
    """Return the tap of one use; None if the result does not depend on it.

    Args:
        use: the use.
        at: the gradients by the outputs of nodes, and by what uses have for operands.
        samples: how many there are.
        arranged: how the rows of uses are arranged.
        inputs: of uses whose taps have been made for other cotangents of the same pass.
        run: the forward pass.
        windows: whether convolutions have their images too.
    """
    gradient = at[use.node]
    if gradient is None:
        return None
    arrangement = arranged.get(use.key, Split(1, 0))
    if use.kind != "elementwise" and use.key not in arranged and len(use.rows(gradient)) % samples:
        samples = 1  # where only sums over all samples are asked for, it does not matter
    if use.kind == "elementwise":
        by_operand = run.parameters[use.name] if use.operand is None else at[use.key]
        assert by_operand is not None
        total = _elementwise_gradient(use, gradient, arrangement, samples, by_operand.shape)
        if use.operand is not None:  # one pass back through the views for each sample
            parameter, edge = run.parameters[use.name], use.operand
            total = torch.stack([pulled_back(edge, parameter, each) for each in total])
        return _lone_tap(total, samples)
    g = by_sample(use.rows(gradient), arrangement, samples)
    if use.key not in inputs:
        a = by_sample(use.inputs(), arrangement, samples)
        window = use.window() if windows and use.window is not None else None
        inputs[use.key] = a if use.kind == "embedding" else a.flatten(1, 2), window
    a, window = inputs[use.key]
    return Tap(
        use.kind,
        a,
        g.flatten(1, 2),
        groups=use.groups,
        size=use.size,
        padding=use.padding,
        kernel=(0, 0) if window is None else window.kernel,
        transposed=use.transposed,
        images=None if window is None else window.images,
    )


def _elementwise_gradient(
    use: Use, gradient: Tensor, arrangement: Arrangement, samples: int, shape: torch.Size
) -> Tensor:
    """Return each sample's gradient by the operand of an elementwise use, [samples, *shape]."""
    parts = use.rows(gradient * use.inputs())
    size = shape.numel()
    arranged = by_sample(parts.reshape(-1), arrangement, samples)
    if len(shape) == 1 and parts.shape[-1] == size and isinstance(arrangement, Split) and arrangement.before == 1:
        return arranged.reshape(samples, -1, size).sum(1)
    entries = torch.arange(size, device=parts.device).reshape(shape).expand(parts.shape).reshape(-1)
    total = parts.new_zeros(samples, size).scatter_add_(1, by_sample(entries, arrangement, samples), arranged)
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
    network: nn.Module, others: Sequence[str], run: Forward, arguments: tuple[Any, ...], seed: Tensor
) -> Iterator[Tensor]:
    """Return for each of these parameters the gradients of each sample's seed . logits, [samples, *shape]."""
    parameters = [run.parameters[name] for name in others]
    raw = {parameter: name for name, parameter in network.named_parameters()}
    theta = {raw[parameter]: parameter.detach() for parameter in parameters}

    def one(theta: dict[str, Tensor], sample: Tensor, at_logits: Tensor) -> Tensor:
        with constant_statistics(network, run.used):
            logits = outputs_at(network, theta, (sample[None], *arguments[1:]))
        return (logits[0] * at_logits).sum()

    size = max(1, CHUNK // max(1, sum(value.numel() for value in theta.values())))
    try:
        # No graph of the others' parameters; and vmap knows no other kernel of attention.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            gradients = torch.func.vmap(torch.func.grad(one), (None, 0, 0), chunk_size=size)(theta, arguments[0], seed)
        return iter([gradients[raw[parameter]] for parameter in parameters])
    except Exception:
        return _by_loop(network, parameters, run, arguments, seed)


def _by_loop(
    network: nn.Module, parameters: Sequence[nn.Parameter], run: Forward, arguments: tuple[Any, ...], seed: Tensor
) -> Iterator[Tensor]:
    """Return the same by a pass for each sample."""
    rows: list[tuple[Tensor, ...]] = []
    for sample in range(len(seed)):
        alone = samples_of(arguments, slice(sample, sample + 1), len(seed))
        with torch.enable_grad(), constant_statistics(network, run.used):
            logits = network(*alone)
        gradients = gradients_of(logits, parameters, seed[sample : sample + 1])
        filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))
        rows.append(tuple(filled))
    return (torch.stack(of_parameter) for of_parameter in zip(*rows, strict=True))
