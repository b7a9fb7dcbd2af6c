"""Which sample each row of a use belongs to, found by trying and not guessed from a length.

A backward pass that begins with the gradients of sample n multiplied by 2^k(n) has exactly 2^k(n) times the first one's
rows wherever a row belongs to sample n, because backward passes are linear and powers of two do not round. With eight
factors a pass, three passes tell 512 samples apart. ``Layouts`` remembers the pattern, so that later batches need no
such pass, unless rows can move from batch to batch.

Convention: a use has R rows, as ``adapters/torch/graph.py`` has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from adapters.torch.graph import Graph, Use, graph_of
from adapters.torch.layers import Statistics, gradients_of

__all__ = ["Arrangement", "Forward", "Key", "Layouts", "Split", "by_sample", "studied"]

# Samples that one backward pass tells apart: their gradients are multiplied by 2^0 to 2^7.
CODES = 8

Key = tuple[Any, ...]


class Split(NamedTuple):
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
        compiled: whether there may be modules that the user has compiled.
        warned: the parameters that a warning has named.
    """

    splits: dict[Key, frozenset[Split]] = field(default_factory=dict)
    mixed: set[Key] = field(default_factory=set)
    selections: set[Key] = field(default_factory=set)
    unfused: bool = False
    compiled: bool = True
    warned: set[str] = field(default_factory=set)


# The rows of each sample: how [R] is split, or their numbers [samples, positions], R for none.
Arrangement = Split | Tensor


@dataclass(frozen=True)
class Forward:
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
        return gradients_of(self.logits, edges, seed, retain_graph=True) if edges else []


def studied(run: Forward, layouts: Layouts) -> tuple[Forward, dict[Key, Arrangement]]:
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


def _arranged_uses(run: Forward, uses: Sequence[Use], layouts: Layouts) -> dict[Key, Arrangement]:
    samples = len(run.logits)
    known = {use.key: layouts.splits.get((run.shapes, use.key), ()) for use in uses if use.key not in layouts.mixed}
    if samples > 1 and not run.graph.routes and all(len(ways) == 1 for ways in known.values()):
        return {key: next(iter(ways)) for key, ways in known.items()}
    nodes = list(dict.fromkeys(use.node for use in uses))
    edges = [GradientEdge(node, 0) for node in nodes]
    generator = torch.Generator("cpu").manual_seed(0)
    seed = torch.randn(run.logits.shape, generator=generator, device="cpu").add_(3).to(run.logits)
    plain = dict(zip(nodes, run.gradients(edges, seed), strict=True))
    coded: list[Mapping[Any, Tensor | None]] = []
    for place in range(10):
        if CODES**place >= samples:
            break
        exponents = torch.arange(samples, device=seed.device) // CODES**place % CODES
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
        return torch.zeros(0, dtype=torch.int64, device="cpu")
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


def _splits(of_row: Tensor, samples: int) -> frozenset[Split]:
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
            ways.add(Split(before, rows))
    return frozenset(ways)


def _divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def _numbers_by_sample(of_row: Tensor, samples: int) -> Tensor:
    """Return the numbers of each sample's rows, [samples, positions], filled up with the number of rows."""
    numbers = [(of_row == sample).nonzero()[:, 0] for sample in range(samples)]
    return nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=len(of_row))


def by_sample(rows: Tensor, arrangement: Arrangement, samples: int) -> Tensor:
    """Return [R, ...] as [samples, positions, ...]."""
    if isinstance(arrangement, Tensor):
        nothing = rows.new_zeros((1, *rows.shape[1:]))
        return torch.cat([rows, nothing])[arrangement]
    if samples == 1 or arrangement.before == 1:
        return rows.reshape(samples, len(rows) // samples, *rows.shape[1:])
    split = rows.reshape(arrangement.before, samples, -1, *rows.shape[1:]).movedim(1, 0)
    return split.reshape(samples, len(rows) // samples, *rows.shape[1:])
