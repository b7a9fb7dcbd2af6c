"""Which parameters of a network learn: all, those that no pattern freezes, or low-rank adapters of some of them.

With adapters (LoRA, Hu 2022), a task learns them and its head; every shared parameter without an adapter stands still,
normalisation and biases among them. ``became_core.projection.low_rank`` says what adapters are. A stage begins with new
ones, which change nothing yet. At its end the effective weights become the shared ones.

Convention: a pattern is one of the shell, such as ``blocks.*.attn.*``. It is compared with the names of the shared
parameters and, without their last part, of the layers: ``fc1`` matches ``fc1.weight`` and ``fc1.bias``. Heads always
learn, whatever the patterns.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from became_core.arrays import device, namespace
from became_core.continual.learner import Learner, heads_of, weights_of
from became_core.errors import BecameError
from became_core.projection import LowRankRegion, Projector, Region, TaskStart

__all__ = ["Adaptation"]


@dataclass(frozen=True)
class Adaptation:
    """Which parameters learn.

    Attributes:
        freeze: patterns of the shared parameters that stand still.
        rank: r of the low-rank adapters, at least 1; a weight whose own rank is lower gets adapters of that rank. None
            for no adapters, unless the projector has a rank of its own.
        layers: patterns of the weights that get adapters: of matrices, and of convolutions, which are matrices of
            flattened patches.
        scale: s, what the product of both factors is multiplied by; above 0. Codes that divide by the rank have
            s = lora_alpha / r.

    Raises:
        BecameError: if the rank is below 1, or the scale is not above 0 and finite.

    Examples:
        >>> sorted(Adaptation(freeze=("conv*", "bn1")).frozen(["conv1.weight", "fc1.weight", "bn1.bias"]))
        ['bn1.bias', 'conv1.weight']
    """

    freeze: tuple[str, ...] = ()
    rank: int | None = None
    layers: tuple[str, ...] = ("*",)
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.rank is not None and self.rank < 1:
            raise BecameError(f"the rank of low-rank adapters is {self.rank}; it must be at least 1, or be left out.")
        if not 0 < self.scale < math.inf:
            raise BecameError(f"the scale of low-rank adapters is {self.scale}; it must be above 0 and finite.")

    def with_own_rank(self, projector: Projector | None) -> "Adaptation":
        """Return the adaptation with the rank of a projector that trains in adapters, unless it has a rank already.

        Args:
            projector: that of the method; None if it has none.
        """
        if self.rank is not None or projector is None or not projector.own_rank:
            return self
        return replace(self, rank=projector.own_rank)

    def frozen(self, names: Iterable[str]) -> frozenset[str]:
        """Return those of these names that a pattern freezes."""
        return _matching(self.freeze, names)

    def adapted(self, learner: Learner) -> frozenset[str]:
        """Return the names of the weights that have adapters: those that match, are matrices, and are not frozen."""
        if self.rank is None:
            return frozenset()
        names = learner.projectable & _shared(learner)
        return _matching(self.layers, names) - self.frozen(names)

    def still(self, learner: Learner) -> frozenset[str]:
        """Return the names of the shared parameters that no stage changes."""
        if self.rank is None and not self.freeze:
            return frozenset()
        shared = _shared(learner)
        return self.frozen(shared) if self.rank is None else shared - self.adapted(learner)

    def check(self, learner: Learner, projector: Projector | None = None) -> None:
        """Raise a BecameError if a pattern matches nothing, nothing is left to adapt, or the rank is above all others.

        The message names some parameters that there are. A projector's own rank, which nobody has asked for, may be
        above all others: every weight then has adapters of its own rank.

        Args:
            learner: the network.
            projector: that of the method; None if it has none.
        """
        shared = _shared(learner)
        for pattern in self.freeze:
            _check_matches("--freeze", pattern, shared)
        resolved = self.with_own_rank(projector)
        if resolved.rank is None:
            return
        for pattern in self.layers:
            _check_matches("--lora-layers", pattern, learner.projectable & shared)
        adapted, theta = resolved.adapted(learner), learner.parameters()
        if not adapted:
            raise BecameError("no layer is left for low-rank adapters: --freeze has all that --lora-layers names.")
        if self.rank is None:
            return
        most = max(_own_rank(theta[name].shape) for name in adapted)
        if self.rank > most:
            raise BecameError(
                f"the rank of low-rank adapters is {self.rank}, and no weight that they adapt has a rank above "
                f"{most}; take at most {most}."
            )

    def region(
        self, learner: Learner, start: TaskStart, rng: np.random.Generator, projector: Projector | None
    ) -> Region | None:
        """Return new adapters, which change nothing yet; None without adapters.

        The rows of A are uniform between -1 and 1, divided by the root of d_in (Hu 2022's code), and then what the
        projector makes of them.

        Args:
            learner: with the weights that the stage begins with.
            start: the task that begins.
            rng: the generator that the rows are drawn from.
            projector: that of the stage; None if it has none.
        """
        if self.rank is None:
            return None
        theta, rows = learner.parameters(), dict[str, Any]()
        for name in sorted(self.adapted(learner)):
            rank, width = min(self.rank, _own_rank(theta[name].shape)), math.prod(theta[name].shape[1:])
            drawn = rng.uniform(-1.0, 1.0, (rank, width)) / math.sqrt(width)
            xp: Any = namespace(weight=theta[name])
            rows[name] = xp.asarray(drawn, dtype=theta[name].dtype, device=device(theta[name]))
        if projector is None:
            return LowRankRegion.initial(rows, theta, scale=self.scale)
        rows, trains = projector.adapter_rows(start, rows), projector.trains_rows
        return LowRankRegion.initial(rows, theta, scale=self.scale, trains_rows=trains)


def _own_rank(shape: Sequence[int]) -> int:
    return min(int(shape[0]), math.prod(shape[1:]))


def _shared(learner: Learner) -> frozenset[str]:
    """Return the names of the weights that no head has, not even one that all tasks share."""
    return frozenset(weights_of(learner)) - heads_of(learner) - learner.shared_head


def _matching(patterns: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    patterns = tuple(patterns)
    return frozenset(
        name
        for name in names
        if any(fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern) for pattern in patterns)
    )


def _check_matches(option: str, pattern: str, names: frozenset[str]) -> None:
    if not _matching([pattern], names):
        some = ", ".join(sorted(names)[:4]) or "none"
        raise BecameError(f"{option} {pattern} matches none of the network's names; some of them are {some}.")
