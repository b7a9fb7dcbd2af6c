"""Runs that differ in nothing but their seed, as one group with a label and a colour.

Convention: groups are in the order in which their first run is met; a group's place among all decides its colour.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from adapters.analysis.bootstrap import Estimate
from adapters.analysis.tables import printable
from adapters.runs import RunResult
from became_core import BecameError
from became_core.continual.metrics import Measure

__all__ = ["MARKERS", "SERIES", "Group", "Results", "groups_of", "have_spread", "labelled"]

# After Okabe and Ito, the light ones darkened for white paper; with the markers, any two differ in more than hue.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b8538f", "#b37400", "#4a9fd8", "#5b4b8a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Group:
    """The runs of one method, backend, configuration and data.

    Attributes:
        label: the method, and what distinguishes this group from others of the method; text from files as it is.
        runs: one for each seed.
        place: the group's number among all groups.
    """

    label: str
    runs: tuple[RunResult, ...]
    place: int

    @property
    def measure(self) -> Measure:
        """What its runs are measured by, which is the same for all runs that are compared."""
        return self.runs[0].measure

    @property
    def colour(self) -> str:
        """The group's colour."""
        return SERIES[self.place % len(SERIES)]

    @property
    def line(self) -> dict[str, Any]:
        """How matplotlib draws the group's lines; from the eighth group on, colours repeat with broken lines."""
        return {
            "color": self.colour,
            "marker": MARKERS[self.place % len(MARKERS)],
            "linestyle": ("-", "--", ":")[self.place // len(SERIES) % 3],
        }

    @property
    def epochs(self) -> Estimate:
        """The epochs that a run spent on a task, both stages together: its mean over tasks, over the group's seeds."""
        return Estimate(tuple(float(np.mean(run.epochs)) for run in self.runs))

    def score(self, name: Literal["acc", "bwt", "forgetting", "plasticity"]) -> Estimate:
        """Return a task-incremental score over the group's seeds."""
        return Estimate(tuple(getattr(run.scores, name) for run in self.runs))

    def values(self, number: Callable[[RunResult], float | None]) -> dict[int, float]:
        """Return a number of each run by seed, of the runs that have it."""
        numbers = {run.seed: number(run) for run in self.runs}
        return {seed: value for seed, value in numbers.items() if value is not None}


Results = RunResult | Group | Sequence[RunResult | Group]


def groups_of(results: Results) -> list[Group]:
    """Return results as groups; a group stays as it is.

    Raises:
        BecameError: if there are no results, a run is there twice, or the runs are of different benchmarks or different
            numbers of tasks.
    """
    entries = [results] if isinstance(results, RunResult | Group) else list(results)
    groups = [entry for entry in entries if isinstance(entry, Group)]
    for label, runs in labelled([entry for entry in entries if isinstance(entry, RunResult)]):
        groups.append(Group(label, tuple(runs), len(groups)))
    _check(groups)
    return groups


def labelled(results: Sequence[RunResult]) -> list[tuple[str, list[RunResult]]]:
    """Return the runs of each method, backend, configuration and data, which differ in their seeds, with a label.

    A run of an earlier version does not say what its data were: they count as those of the others, if these agree.
    """
    alike: dict[str, list[RunResult]] = {}
    for run in results:
        alike.setdefault(json.dumps([run.method, run.backend, run.config], sort_keys=True), []).append(run)
    groups: list[list[RunResult]] = []
    for runs in alike.values():
        data = dict.fromkeys(run.data for run in runs)
        several = len(data.keys() - {None}) > 1
        groups += [[run for run in runs if run.data == each] for each in data] if several else [runs]
    return list(zip(_labels([runs[0] for runs in groups]), groups, strict=True))


def have_spread(groups: Sequence[Group]) -> bool:
    """Whether any group has several seeds, so that there is a spread to show and to explain."""
    return any(len(group.runs) > 1 for group in groups)


def _check(groups: Sequence[Group]) -> None:
    if not groups:
        raise BecameError("there are no finished runs to report on; give at least one.")
    first = groups[0].runs[0]
    for group in groups:
        seeds = [run.seed for run in group.runs]
        for run in group.runs:
            if seeds.count(run.seed) > 1:
                raise BecameError(f"{printable(group.label)} with seed {run.seed} is there twice; leave one out.")
            ours, theirs = ((one.benchmark, len(one.accuracy)) for one in (first, run))
            if ours != theirs:
                raise BecameError(
                    f"{printable(run.method)} learned {theirs[1]} tasks of {printable(theirs[0])}, where "
                    f"{printable(first.method)} learned {ours[1]} of {printable(ours[0])}; report on one benchmark at "
                    "a time."
                )


def _labels(runs: Sequence[RunResult]) -> list[str]:
    """Each run's method and, if others share it, up to two values in which they differ, or else a number."""
    labels = []
    for run in runs:
        values = {"backend": run.backend, **run.config}
        others = [{"backend": other.backend, **other.config} for other in runs if other.method == run.method]
        differing = [name for name in values if any(other.get(name) != values[name] for other in others)]
        label = run.method
        if len(others) > 1:
            differences = ", ".join(f"{name} {values[name]}" for name in differing[:2])
            label = f"{run.method} ({differences or 'other configuration'})"
        labels.append(label)
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[: place + 1].count(label)}"
        for place, label in enumerate(labels)
    ]
