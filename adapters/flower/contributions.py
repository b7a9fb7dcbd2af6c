"""What clients of a federation send, checked and merged. NumPy alone: nothing here needs Flower.

Convention: a client's Fisher information is a mean over its samples; times its count it is the curvature of the sum of
its losses, which is what is added over clients. Clients are merged in the order in which they are given.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from became_core.laplace import LaplacePosterior, MergeRule
from became_core.precision import Diagonal

__all__ = ["Arrays", "Contribution", "limited", "merged", "why_not"]

Arrays = Mapping[str, NDArray[Any]]

# More samples than any client has: a count above it is a lie, and would drown all others.
MOST_SAMPLES = 10**9


@dataclass(frozen=True)
class Contribution:
    """What one client sends after a round.

    Attributes:
        node: its number.
        weights: by name.
        fisher: the diagonal of the Fisher information at these weights, a mean over samples, by name.
        count: the number of its samples.
    """

    node: int
    weights: Arrays
    fisher: Arrays
    count: int

    @property
    def curvature(self) -> float:
        """The trace of the curvature of its loss, a sum over samples; infinite if it is too large for a float."""
        with np.errstate(over="ignore"):
            return self.count * sum(float(np.sum(value, dtype=np.float64)) for value in self.fisher.values())


def why_not(contribution: Contribution, sent: Arrays, without_fisher: Collection[str] = ()) -> str | None:
    """Return in a clause why a client is to be left out; None if it is to be merged.

    Args:
        contribution: what it sent back.
        sent: the weights that it was sent.
        without_fisher: the names for which clients send no Fisher information, such as running statistics.
    """
    count = contribution.count
    if type(count) is not int or not 0 < count <= MOST_SAMPLES:
        return f"its count of samples is {count}; it must be a whole number from 1 to {MOST_SAMPLES}"
    expected = {name: value for name, value in sent.items() if name not in without_fisher}
    reason = _misfit("weights", contribution.weights, sent) or _misfit("Fisher", contribution.fisher, expected)
    if reason is not None:
        return reason
    for name, value in contribution.weights.items():
        if value.dtype != sent[name].dtype:
            return f"its weights of '{name}' are {value.dtype}, not {sent[name].dtype}"
    for name, value in contribution.fisher.items():
        if np.any(value < 0):
            return f"its Fisher of '{name}' is negative, which no Fisher information is"
    if not math.isfinite(contribution.curvature):
        return "the sum of its Fisher is not finite"
    return None


def _misfit(what: str, arrays: Arrays, like: Arrays) -> str | None:
    for name in {**like, **arrays}:
        if name not in arrays or name not in like:
            return f"its {what} {'lack' if name in like else 'have an unknown'} '{name}'"
        value = arrays[name]
        if value.shape != like[name].shape:
            return f"its {what} of '{name}' have shape {value.shape}, not {like[name].shape}"
        real = np.issubdtype(value.dtype, np.integer) or np.issubdtype(value.dtype, np.floating)
        if not real or not np.all(np.isfinite(value)):
            return f"its {what} of '{name}' are not all finite numbers"
    return None


def limited(contributions: Sequence[Contribution], cap: float | None) -> tuple[list[Contribution], list[str]]:
    """Return the contributions, none with more than ``cap`` times the median curvature, and a sentence on each change.

    Whoever claims a large curvature has the say in a merge. Of two clients, or of two in the middle, the median is the
    smaller one. What has no Fisher information is averaged by counts, which are not limited.

    Args:
        contributions: of at least one client.
        cap: the limit; None for no limit.
    """
    if cap is None:
        return list(contributions), []
    most = cap * statistics.median_low([contribution.curvature for contribution in contributions])
    sentences, within = [], []
    for contribution in contributions:
        if most > 0 and contribution.curvature > most:
            share = most / contribution.curvature
            fisher = {name: value * share for name, value in contribution.fisher.items()}
            times = contribution.curvature / most * cap
            sentences.append(
                f"node {contribution.node} claims {times:.3g} times the median curvature; it counts with {cap:g} times."
            )
            contribution = replace(contribution, fisher=fisher)
        within.append(contribution)
    return within, sentences


def merged(contributions: Sequence[Contribution], rule: MergeRule) -> dict[str, NDArray[Any]]:
    """Return the weights that a rule makes of the clients'.

    The rule is given each client's weights and its loss near them: a Laplace posterior with the client's share of all
    samples times its Fisher information. What has no Fisher information is averaged by samples.

    >>> import numpy as np
    >>> from became_core import FisherMerge
    >>> first = Contribution(1, {"w": np.array([0.0, 0.0])}, {"w": np.array([3.0, 0.0])}, 10)
    >>> second = Contribution(2, {"w": np.array([4.0, 4.0])}, {"w": np.array([1.0, 2.0])}, 10)
    >>> merged([first, second], FisherMerge())["w"].tolist()
    [1.0, 4.0]

    Args:
        contributions: of at least one client, all checked by ``why_not``.
        rule: ``Became``, ``FisherMerge``, ``ModeIMM``, or another.
    """
    first, *others = contributions
    if not others:
        return {**first.weights}
    total = sum(contribution.count for contribution in contributions)
    shares = [contribution.count / total for contribution in contributions]
    theta: dict[str, NDArray[Any]] = {}
    for name, like in first.weights.items():
        if name not in first.fisher:
            mean = sum(
                share * np.asarray(each.weights[name], np.float64)
                for share, each in zip(shares, contributions, strict=True)
            )
            whole = np.issubdtype(like.dtype, np.integer)
            theta[name] = np.asarray(np.rint(mean) if whole else mean).astype(like.dtype)
    models = [{name: each.weights[name] for name in first.fisher} for each in contributions]
    losses = [
        LaplacePosterior(model, Diagonal({name: share * each.fisher[name].astype(np.float64) for name in model}))
        for model, share, each in zip(models, shares, contributions, strict=True)
    ]
    of_rule = rule.merge(models, losses).theta
    theta |= {name: np.asarray(of_rule[name]).astype(first.weights[name].dtype) for name in first.fisher}
    return {name: theta[name] for name in first.weights}
