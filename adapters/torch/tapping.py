"""Taps from PyTorch modules: hooks that record layer inputs, and output gradients by one backward pass.

Convention: as in ``became_core.curvature.taps``. No weight gradient is computed: the backward pass stops at a layer's
output.

No parameter is passed over in silence: the graph of the forward pass is read for how often it uses each, and one that
is used otherwise than by the layers that taps know (in a layer of another class, as a bare parameter, by two modules,
by a layer whose first axis is not the samples') has its per-sample gradients computed by ``torch.func.vmap(grad)``,
with a warning that names it.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters.torch.layers import (
    Statistics,
    arranged_inputs,
    constant_statistics,
    input_tap_of,
    is_known,
    is_matrix,
    tap_of,
)
from became_core.curvature import Tap, Taps

__all__ = ["Names", "collect_inputs", "collect_taps", "layers_with_samples_first"]

# Per-sample gradients that vmap computes at a time, in numbers.
CHUNK = 2**22

# All modules of a network by canonical name.
Names = Mapping[nn.Module, str]


class _Saved(torch.autograd.Function):
    """Saves a tensor for a backward pass, so that autograd notices if the tensor is overwritten afterwards."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.clone()


class _Run(NamedTuple):
    """One run of a layer.

    Attributes:
        inputs: arranged for the tap.
        saved: the node that saved these inputs.
        output: the output's place in the graph.
    """

    inputs: Tensor
    saved: Any
    output: GradientEdge

    def is_unchanged(self) -> bool:
        """Whether the inputs are still those that the layer saw."""
        try:
            return self.saved.saved_tensors is not None
        except RuntimeError:  # as autograd says that a saved tensor was overwritten
            return False


class _Forward(NamedTuple):
    """A forward pass: its logits, the runs of each layer to be tapped, all other parameters used, its statistics."""

    logits: Tensor
    runs: dict[nn.Module, list[_Run]]
    others: dict[str, nn.Parameter]
    used: Statistics


def collect_taps(
    network: nn.Module,
    names: Names,
    arguments: tuple[Any, ...],
    cotangents: Callable[[Tensor], Iterable[Tensor]],
    *,
    layers: Collection[nn.Module] | None = None,
    per_sample: bool = True,
) -> Iterator[Taps]:
    """Run one forward pass and a backward pass for each cotangent; yield the taps of each.

    Args:
        network: what runs, in the mode it is in; it returns logits [samples, classes].
        names: all its modules by canonical name.
        arguments: of the network, the first being the samples, [N, ...].
        cotangents: from logits to the gradients by them that backward passes begin with.
        layers: those that may be tapped; if not given, all of a known class.
        per_sample: whether per-sample gradients exist, batch statistics being constants; otherwise a parameter of which
            no layer's tap speaks has one gradient, the batch's.
    """
    logits, runs, others, used = _forward(network, names, arguments, layers, per_sample=per_sample)
    if per_sample:
        _warn_of(others, names)
    wanted: list[Any] = [run.output for runs_of_layer in runs.values() for run in runs_of_layer]
    wanted += [] if per_sample else list(others.values())
    seeds = list(cotangents(logits.detach()))
    for index, seed in enumerate(seeds):
        more = index + 1 < len(seeds)
        gradients = iter(torch.autograd.grad(logits, wanted, seed, retain_graph=more) if wanted else ())
        taps = {
            names[module]: _together([tap_of(module, run.inputs, next(gradients)) for run in runs_of_layer])
            for module, runs_of_layer in runs.items()
        }
        rest = _per_sample_gradients(network, others, arguments, seed, used) if per_sample and others else gradients
        yield taps | {
            name: _lone_tap(value, len(seed) if per_sample else 1) for name, value in zip(others, rest, strict=True)
        }


@torch.no_grad()
def collect_inputs(
    network: nn.Module, names: Names, arguments: tuple[Any, ...], layers: Collection[nn.Module]
) -> Iterator[Taps]:
    """Run one forward pass; yield the taps of the matrices' inputs, once for every time that one of them runs.

    Args:
        network: what runs.
        names: all its modules by canonical name.
        arguments: of the network.
        layers: those that may be tapped.
    """
    passes: list[dict[str, Tap]] = []
    runs: Counter[nn.Module] = Counter()

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - a hook's signature
        runs[module] += 1
        if runs[module] > len(passes):
            passes.append({})
        passes[runs[module] - 1][names[module]] = input_tap_of(module, inputs[0])

    handles = [module.register_forward_hook(record) for module in layers if is_matrix(module)]
    try:
        network(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    yield from passes


def layers_with_samples_first(network: nn.Module, names: Names, arguments: tuple[Any, ...]) -> frozenset[nn.Module]:
    """Return the layers of a known class that keep samples apart, on their first axis.

    A layer may see another axis first, such as time, which may happen to be as long as that of the samples. So the loss
    is taken of the first of a few samples alone: then no other row of an output's gradient differs from zero.

    Args:
        network: what runs, in evaluation mode.
        names: all its modules by canonical name.
        arguments: of the network, the first being a few samples.
    """
    logits, runs, _, _ = _forward(network, names, arguments, None, per_sample=True)
    seed = torch.zeros_like(logits)
    seed[0] = torch.linspace(1, 2, seed.shape[1])
    outputs = [run.output for runs_of_layer in runs.values() for run in runs_of_layer]
    gradients = iter(torch.autograd.grad(logits, outputs, seed) if outputs else ())
    mixes = {module: [bool(next(gradients)[1:].any()) for _ in of_layer] for module, of_layer in runs.items()}
    return frozenset(module for module, of_layer in mixes.items() if not any(of_layer))


def _forward(
    network: nn.Module, names: Names, arguments: tuple[Any, ...], layers: Collection[nn.Module] | None, per_sample: bool
) -> _Forward:
    runs: dict[nn.Module, list[_Run]] = {
        module: [] for module in names if is_known(module) and (layers is None or module in layers)
    }
    statistics = constant_statistics(network) if per_sample else nullcontext(Statistics())
    with _recorded(runs, len(arguments[0])), statistics as used:
        logits = network(*arguments)
    nodes, uses = _graph(logits)
    owners = _owners(names)
    explained = {}
    for module, runs_of_layer in runs.items():
        taken = [run for run in runs_of_layer if run.output.node in nodes]
        own = dict(module.named_parameters(recurse=False))
        if (
            taken
            and own
            and all(run.is_unchanged() for run in taken)
            and all(owners[value] == _joined(names[module], name) and names[module] for name, value in own.items())
            and all(uses[value] == len(taken) for value in own.values())
        ):
            explained[module] = taken
    served = {parameter for module in explained for parameter in module.parameters(recurse=False)}
    others = {name: parameter for parameter, name in owners.items() if uses[parameter] and parameter not in served}
    return _Forward(logits, explained, others, used)


@contextmanager
def _recorded(runs: dict[nn.Module, list[_Run]], samples: int) -> Iterator[None]:
    """Add the layers' runs, for the time of this context."""

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if inputs and output.requires_grad and len(inputs[0]) == len(output) == samples:
            with torch.no_grad():
                arranged = arranged_inputs(module, inputs[0].detach())
            with torch.enable_grad():
                saved = _Saved.apply(torch.zeros((), requires_grad=True), arranged).grad_fn  # type: ignore[no-untyped-call]
            # The place, and not the output itself, which may be overwritten: by ReLU(inplace=True), for one.
            runs[module].append(_Run(arranged, saved, get_gradient_edge(output)))

    handles = [module.register_forward_hook(record) for module in runs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _graph(result: Tensor) -> tuple[set[Node], Counter[Tensor]]:
    """Return the nodes of the graph that a result comes from, and how many of them use each of its leaves."""
    nodes: set[Node] = set()
    uses: Counter[Tensor] = Counter()
    waiting = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        for before, _ in node.next_functions:
            leaf = getattr(before, "variable", None)  # where a leaf's gradient gathers
            if leaf is None:
                waiting.append(before)
            else:
                uses[leaf] += 1
    return nodes, uses


def _owners(names: Names) -> dict[nn.Parameter, str]:
    """Return the canonical name of each parameter: that in the first module that has it."""
    owners: dict[nn.Parameter, str] = {}
    for module, layer in names.items():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, _joined(layer, name))
    return owners


def _joined(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _together(taps: list[Tap]) -> Tap:
    """Return a layer's runs in one pass as one tap, with the positions of all."""
    if len(taps) == 1:
        return taps[0]
    inputs, gradients = (torch.cat([getattr(tap, side) for tap in taps], 1) for side in ("inputs", "output_gradients"))
    return replace(taps[0], inputs=inputs, output_gradients=gradients)


def _lone_tap(gradient: Tensor, samples: int) -> Tap:
    flat = gradient.reshape(samples, 1, -1)
    return Tap("gradient", flat, torch.ones_like(flat[..., :1]))


def _warn_of(others: Mapping[str, nn.Parameter], names: Names) -> None:
    classes = {layer: type(module).__name__ for module, layer in names.items()}
    for name in others:
        layer = name.rpartition(".")[0]
        where = f"the layer '{layer}'" if layer else "the network itself"
        warnings.warn(
            f"taps do not know how the parameter '{name}' is used, in {where}, a {classes[layer]}; its per-sample "
            "gradients are computed by vmap, which is exact but slower.",
            stacklevel=3,
        )


def _per_sample_gradients(
    network: nn.Module, others: Mapping[str, nn.Parameter], arguments: tuple[Any, ...], seed: Tensor, used: Statistics
) -> Iterator[Tensor]:
    """Return for each of these parameters the gradients of each sample's seed . logits, [samples, *shape]."""
    raw = {parameter: name for name, parameter in network.named_parameters()}
    theta = {raw[parameter]: parameter.detach() for parameter in others.values()}

    def one(theta: dict[str, Tensor], sample: Tensor, at_logits: Tensor) -> Tensor:
        with constant_statistics(network, used):
            logits: Tensor = torch.func.functional_call(network, theta, (sample[None], *arguments[1:]))
        return (logits[0] * at_logits).sum()

    size = max(1, CHUNK // sum(value.numel() for value in theta.values()))
    # No graph of the others' parameters; and vmap knows no other kernel of attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        gradients = torch.func.vmap(torch.func.grad(one), (None, 0, 0), chunk_size=size)(theta, arguments[0], seed)
    return iter([gradients[name] for name in theta])
