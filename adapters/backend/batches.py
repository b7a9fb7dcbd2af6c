"""Batches of a user's own loop: how they are read and drawn, and means over them.

Convention: outputs are [samples, ...]. Gradients by the outputs are those of each sample's own loss, not divided by
anything; ``units_of`` says what a mean divides by.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Generic, TypeVar

import numpy as np

from became_core import BecameError
from became_core.arrays import Array, namespace
from became_core.curvature import Categorical, Likelihood

__all__ = [
    "Reader",
    "counted",
    "drawn",
    "gradient_by_outputs",
    "inputs_and_targets",
    "length_of",
    "mean_loss",
    "repeatable",
    "units_of",
    "with_progress",
]

Model = TypeVar("Model")

# How many batches are measured if the user does not say: a quarter of many, which takes less time than three forward
# passes over all of them (benchmarks/own_loop.py), and all of a few.
FEW = 64
SHARE = 0.25


@dataclass(frozen=True)
class Reader(Generic[Model]):
    """How batches are read.

    Attributes:
        apply: (model, batch) -> outputs; None for the ways that the framework's own reader knows.
        targets: batch -> targets; likewise.
    """

    apply: Callable[[Model, Any], Array] | None = None
    targets: Callable[[Any], Any] | None = None

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Return what the model takes, and the targets.

        Raises:
            BecameError: if the batch is of a kind that only ``apply`` and ``targets`` can read.
        """
        if self.apply is not None or self.targets is not None:
            if self.apply is None or self.targets is None:
                raise BecameError("batches of your own need both apply= and targets=; one of them is missing.")
            return batch, self.targets(batch)
        return self.known(batch)

    def known(self, batch: Any) -> tuple[Any, Any]:
        """Return the same of a batch that needs no ``apply`` and ``targets``; raises as ``split`` does."""
        return inputs_and_targets(batch, "or give apply= and targets=, which say what to do with it")


def inputs_and_targets(batch: Any, otherwise: str) -> tuple[Any, Any]:
    """Return the inputs and the targets of a pair, or of a mapping with ``labels``, as ``transformers`` has it.

    Args:
        batch: of one of these kinds.
        otherwise: what a message says of batches of other kinds: "or give ...".

    Raises:
        BecameError: if it is of another kind.

    Examples:
        >>> inputs_and_targets({"ids": [1, 2], "labels": [0]}, "or give pairs")
        ({'ids': [1, 2]}, [0])
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise BecameError(f"a batch has the keys {', '.join(map(str, batch))}; it needs labels, {otherwise}.")
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise BecameError(
        f"a batch is a {type(batch).__name__}; give pairs of inputs and targets, mappings with labels, {otherwise}."
    )


def repeatable(batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches that can be gone through more than once; those of an iterator are kept in a list."""
    return list(batches) if iter(batches) is batches else batches


def length_of(batches: Any) -> int | None:
    """Return how many batches there are; None if that is not known, as of an iterator or a stream."""
    try:
        return len(batches)
    except TypeError:  # a loader of a stream has a length that raises it
        return None


def drawn(batches: Iterable[Any], share: float | None, total: int | None) -> Iterator[Any]:
    """Yield a random share of batches, in their order: the first one, and each other one with this probability.

    What is drawn by chance has the mean of the whole, also where batches come in a pattern. The same batches are drawn
    every time.

    Args:
        batches: all of them.
        share: in (0, 1]; None for all of up to 64 batches, 64 of up to 256, and a quarter of more.
        total: how many batches there are in all processes; None if that is not known, and then None is a share of 1.

    Raises:
        BecameError: if the share is outside of (0, 1].

    Examples:
        >>> [len(list(drawn(range(total), None, total))) for total in (10, 64, 1000)]
        [10, 64, 253]
    """
    if share is None:
        share = max(FEW / total, SHARE) if total else 1.0
    elif not 0 < share <= 1:
        raise BecameError(f"the share of the batches is {share}; it must be above 0 and at most 1.")
    rng = np.random.default_rng(0)
    for index, batch in enumerate(batches):
        if rng.random() < share or index == 0:
            yield batch


def with_progress(batches: Iterable[Any], what: str, shows: bool, total: int | None) -> Iterator[Any]:
    """Yield batches, and show on a terminal how many are done, of a total if it is known."""
    if shows:
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        if console.is_terminal:
            yield from track(batches, what, total, console=console, transient=True)
            return
    yield from batches


def units_of(loss: Likelihood, outputs: Array, targets: Any) -> float:
    """Return what a mean over a batch divides by: samples or tokens, as the likelihood says.

    Raises:
        BecameError: if the targets are no labels of these outputs, where the likelihood has labels.
    """
    if isinstance(loss, Categorical):
        _check_labels(loss, outputs, targets)
    return loss.units(outputs, targets)


def counted(units: float) -> float:
    """Return what a mean divides by; raise a BecameError if it is 0, as where there are no batches."""
    if not units:
        raise BecameError("there are no samples; give at least one batch, and no iterator that has been read before.")
    return units


def mean_loss(
    loss: Likelihood,
    passes: Iterable[tuple[Array, Any]],
    summed: Callable[..., Iterable[float]] | None = None,
) -> float:
    """Return the mean loss over batches.

    Args:
        loss: a likelihood.
        passes: the outputs and the targets of each batch.
        summed: from this process's sum of losses and its samples or tokens to those of all processes.

    Raises:
        BecameError: if there is no batch, or a loss of the user's own is no single number.
    """
    total = units = 0.0
    for outputs, targets in passes:
        units += units_of(loss, outputs, targets)
        total += float(loss.loss(outputs, targets))
    if summed is not None:
        total, units = summed(total, units)
    return total / counted(units)


def _check_labels(likelihood: Categorical, outputs: Array, targets: Any) -> None:
    xp, classes = namespace(targets=targets), int(outputs.shape[-1])
    if not xp.isdtype(targets.dtype, "integral"):
        raise BecameError(
            f"the targets are {targets.dtype}; the categorical likelihood needs labels, which are integers."
        )
    labels = xp.where(targets == likelihood.ignored, xp.zeros_like(targets), targets)
    if math.prod(labels.shape):
        least, greatest = int(xp.min(labels)), int(xp.max(labels))
        if least < 0 or greatest >= classes:
            raise BecameError(
                f"a batch has the label {least if least < 0 else greatest}; the model has {classes} outputs, so labels "
                f"go from 0 to {classes - 1}, and {likelihood.ignored} is ignored."
            )


def gradient_by_outputs(loss: Likelihood, outputs: Array, targets: Any) -> Array:
    """Return the gradient of the sum of all samples' losses by the outputs."""
    # Where gradients of single tokens are squared, they come one by one.
    return reduce(add, loss.cotangents(outputs, targets, "empirical", np.random.default_rng(0)))
