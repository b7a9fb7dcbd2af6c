"""What a method around a user's own training loop reports, in any framework: coverage, merges and checks.

Convention: losses and curvatures are means over samples or over tokens, as the likelihood says.
"""

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from became_core import BecameError, Quadratic
from became_core.curvature import likelihood_named
from became_core.projection import Projector

__all__ = [
    "Coverage",
    "Covered",
    "Finding",
    "MergeReport",
    "NetworkCheck",
    "Uncovered",
    "coverage_of",
    "first_difference",
    "known_likelihood",
    "say_changed",
]

# What is done with a parameter that the projector cannot protect.
Uncovered = Literal["penalised", "frozen", "free"]


@dataclass(frozen=True)
class Covered:
    """What happens to one parameter while training is stable.

    Attributes:
        name: of the parameter.
        use: what the network does with it: "matrix", or whatever else taps found.
        treatment: "protected" by the projector, "penalised", "frozen" or "free" otherwise; "not trained" if the user
            has frozen it.
        size: how many weights it has.
        rank: the dimension of its protected space; 0 if it has none.
        width: the dimension of the space that this lies in; 0 if it has none.
    """

    name: str
    use: str
    treatment: str
    size: int
    rank: int = 0
    width: int = 0


@dataclass(frozen=True)
class Coverage:
    """What happens to every parameter while training is stable; printed, it is a table.

    Attributes:
        parameters: in the order of the model.
    """

    parameters: Sequence[Covered]

    def share(self, treatment: str) -> float:
        """Return the share of all weights that are treated so, in [0, 1]."""
        total = sum(parameter.size for parameter in self.parameters)
        return sum(parameter.size for parameter in self.parameters if parameter.treatment == treatment) / (total or 1)

    @property
    def free_share(self) -> float:
        """The share of the protected weights' directions in which they may still move."""
        protected = [parameter for parameter in self.parameters if parameter.treatment == "protected"]
        total = sum(parameter.size for parameter in protected)
        return sum(p.size * (1 - p.rank / p.width) for p in protected) / (total or 1)

    @property
    def summary(self) -> str:
        """One line."""
        parts = [
            f"{100 * self.share(treatment):.1f} % {treatment}"
            for treatment in ("protected", "penalised", "frozen", "free", "not trained")
            if self.share(treatment)
        ]
        total = sum(parameter.size for parameter in self.parameters)
        line = f"{total:,} weights: {', '.join(parts)}."
        if self.share("protected"):
            line += f" Of the protected ones' directions, {100 * self.free_share:.1f} % may still move."
        return line

    def __str__(self) -> str:
        """Return the table, with the summary below."""
        rows = [("parameter", "use", "treatment", "weights", "rank")]
        for p in self.parameters:
            rows.append((p.name, p.use, p.treatment, f"{p.size:,}", f"{p.rank} of {p.width}" if p.width else ""))
        return f"{_table(rows)}\n{self.summary}"


def coverage_of(
    sizes: Mapping[str, int],
    trained: Collection[str],
    matrices: Mapping[str, bool],
    projector: Projector,
    uncovered: Uncovered,
    held: Collection[str] | None = None,
) -> Coverage:
    """Return what happens to every parameter while training is stable.

    Args:
        sizes: of all parameters, in the order of the model.
        trained: the names of those that are trained.
        matrices: the names of those that are used as matrices alone, and whether they are stored as [d_in, d_out].
        projector: the memory.
        uncovered: what is done with those that it does not protect.
        held: the names of those that this can be done with, as the others are newer than the memory; None for all.
    """
    ranks, rows = projector.rank, []
    for name, size in sizes.items():
        use = "matrix, transposed" if matrices.get(name) else "matrix" if name in matrices else "other"
        if name not in trained:
            rows.append(Covered(name, use, "not trained", size))
        elif name in ranks:
            rows.append(Covered(name, use, "protected", size, *ranks[name]))
        else:
            rows.append(Covered(name, use, uncovered if held is None or name in held else "free", size))
    return Coverage(rows)


def known_likelihood(likelihood: Any) -> Any:
    """Return the likelihood of a name; a likelihood, or a loss of the user's own, as it is.

    Raises:
        BecameError: if there is none of this name, or a loss says of itself that it is a sum.
    """
    if getattr(likelihood, "reduction", None) == "sum":
        raise BecameError("the loss is a sum over samples (reduction='sum'); give one that is the mean.")
    return likelihood_named(likelihood) if isinstance(likelihood, str) else likelihood


def say_changed(name: str, *, has_stepped: bool) -> None:
    """Say that a weight was changed by something else than the steps of the optimizers that ``stable`` was given.

    If these have taken no step at all, it is a warning, for then weights may have been loaded.

    Raises:
        BecameError: if they have.
    """
    if not has_stepped:
        warnings.warn(
            f"the optimizers that stable() was given have taken no step, and '{name}' has changed: unless it was "
            "loaded, nothing held it to old data; give stable() every optimizer that trains the model.",
            stacklevel=5,  # where the context ends
        )
        return
    raise BecameError(
        f"'{name}' was changed in stable training by something else than the steps of the optimizers that stable() was "
        "given; give it every optimizer that trains the model, and let the model change no parameter by itself."
    )


def warn_of_statistics(before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> None:
    """Warn if stable training has changed the running mean of a batch norm, given those of all of them, by layer."""
    moved = [name for name, mean in after.items() if name in before and not np.array_equal(before[name], mean)]
    if moved:
        warnings.warn(
            f"the running statistics of '{moved[0]}' have changed in stable training, and with them the "
            "outputs of old data, though protected weights stand still; keep such layers in evaluation mode.",
            stacklevel=4,  # where the context ends
        )


@dataclass(frozen=True)
class MergeReport:
    """What a merge found, and expects.

    Attributes:
        alpha: the coefficient of the plastic model, alpha*.
        slopes: the slopes of the estimated cumulative loss along the way, at the stable and at the plastic model.
        gain: how much lower that loss is at alpha* than at the stable model.
        is_convex: whether it is convex along the way.
        promised: whether the slopes at the ends have opposite signs: then the merged model is better than both ends, if
            the quadratic approximation holds (the plasticity theorem; BECAME, Section 3.3).
        curvature: how the new task's curvature along the way was measured.
        quadratic: the estimated loss along the way.
        trace: pairs of alpha and the true mean loss of the new task there, if it was asked for.
    """

    alpha: float
    slopes: tuple[float, float]
    gain: float
    is_convex: bool
    promised: bool
    curvature: str
    quadratic: Quadratic = field(repr=False)
    trace: Sequence[tuple[float, float]] = ()

    def plot(self) -> Any:
        """Return a matplotlib figure of the estimated loss along the way, and of the true one if it was traced.

        Raises:
            BecameError: if matplotlib is missing; the extra ``report`` has it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise BecameError("a plot needs matplotlib; install became[report].") from None
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        alphas = [index / 50 for index in range(51)]
        axes.plot(alphas, [float(self.quadratic.value(alpha)) for alpha in alphas], label="all tasks, estimated")
        if self.trace:
            first = self.trace[0][1]
            axes.plot(*zip(*((alpha, loss - first) for alpha, loss in self.trace), strict=True), "o", label="new task")
        axes.axvline(self.alpha, linestyle=":", color="grey")
        axes.set(xlabel="α", ylabel="change of the loss", title=f"α* = {self.alpha:.3f}")
        axes.legend()
        return figure

    def __str__(self) -> str:
        """Return the report in one line."""
        ends = "lower than at both ends" if self.promised else "not lower than at both ends"
        return (
            f"α* = {self.alpha:.3f} of the way from the stable to the plastic model. If the loss of all tasks is "
            f"quadratic on this way, as estimated, it is {self.gain:.3g} lower there than at the stable model, and "
            f"{ends}; its slopes at the ends are {self.slopes[0]:.3g} and {self.slopes[1]:.3g}. The new task's "
            f"curvature is by {self.curvature}." + (" This keeps the stable model." if self.alpha == 0 else "")
        )


@dataclass(frozen=True)
class Finding:
    """One comparison of a check.

    Attributes:
        what: was compared.
        difference: the largest difference, as a share of the largest value.
        tolerance: up to which it is rounding.
    """

    what: str
    difference: float
    tolerance: float

    @property
    def is_sound(self) -> bool:
        """Whether both sides agree; what is not a number does not."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class NetworkCheck:
    """What a look at a user's network found; printed, it is a table."""

    # Two checks are alike for JAX, which compiles anew where what is not an array differs.
    findings: tuple[Finding, ...] = field(compare=False)

    def __str__(self) -> str:
        """Return the table."""
        rows = [("compared", "difference", "")]
        rows += [(f.what, f"{f.difference:.1e}", "as it should be" if f.is_sound else "differs") for f in self.findings]
        return _table(rows)

    def assert_sound(self) -> None:
        """Raise a BecameError with the table if something differs."""
        wrong = [finding for finding in self.findings if not finding.is_sound]
        if any(math.isnan(finding.difference) for finding in wrong):
            raise BecameError(
                "the network's outputs or their derivatives are not finite for the first samples; look at the inputs "
                f"and the weights. check=False leaves this check out.\n{self}"
            )
        if wrong:
            raise BecameError(
                f"the network fails its first look: {', '.join(finding.what for finding in wrong)}. What should agree "
                "differs; look for randomness in evaluation, for outputs that depend on a batch's other samples, or "
                f"for gradients that are not those of the outputs. check=False leaves this check out.\n{self}"
            )


def first_difference(own: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]]) -> str | None:
    """Return in words the first difference between two models' parameters, shapes by name; None if there is none.

    >>> first_difference({"a": (2,), "b": (3,)}, {"a": (2,), "b": (4,)})
    "'b' is [3] in the model and [4] in the memory"
    """
    for name, shape in own.items():
        if name not in other:
            return f"the memory has no '{name}'"
        if list(shape) != list(other[name]):
            return f"'{name}' is {list(shape)} in the model and {list(other[name])} in the memory"
    return next((f"the model has no '{name}'" for name in other if name not in own), None)


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    """Return rows as a table of plain text, whose first row is its head."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
