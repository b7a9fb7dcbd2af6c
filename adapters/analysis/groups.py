"""Runs that differ in nothing but their seed, as one group with a label and a colour.

Convention: groups in the order in which their first run is met; a group's place among all is its colour.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.analysis.drawing import MARKERS, SERIES, shown
from adapters.runs import RunResult
from became_core import BecameError

__all__ = ["Group", "Results", "groups_of", "spread"]


@dataclass(frozen=True)
class Group:
    """The runs of one method, backend and configuration.

    Attributes:
        label: the method, and what tells it from other groups of that method; as the files have it.
        runs: one for each seed.
        place: its number among all groups.
    """

    label: str
    runs: tuple[RunResult, ...]
    place: int

    @property
    def name(self) -> str:
        """The label for a figure."""
        return shown(self.label)

    @property
    def colour(self) -> str:
        """The colour of the group."""
        return SERIES[self.place % len(SERIES)]

    @property
    def line(self) -> dict[str, Any]:
        """How the group's lines look; from the eighth group on, colours come again with broken lines."""
        return {
            "color": self.colour,
            "marker": MARKERS[self.place % len(MARKERS)],
            "linestyle": ("-", "--", ":")[self.place // len(SERIES) % 3],
        }


Results = RunResult | Group | Sequence[RunResult | Group]


def groups_of(results: Results) -> list[Group]:
    """Return results as groups; what is a group already stays as it is.

    Raises:
        BecameError: if there are none, they are of different benchmarks or numbers of tasks, or one is there twice.
    """
    given = [results] if isinstance(results, RunResult | Group) else list(results)
    groups = [each for each in given if isinstance(each, Group)]
    found: dict[str, list[RunResult]] = {}
    for run in (each for each in given if isinstance(each, RunResult)):
        key = json.dumps([run.method, run.backend, run.config], sort_keys=True)
        found.setdefault(key, []).append(run)
    labels = _labels([runs[0] for runs in found.values()])
    places = range(len(groups), len(groups) + len(found))
    groups += [Group(*each) for each in zip(labels, map(tuple, found.values()), places, strict=True)]
    _check(groups)
    return groups


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return a mean, with the standard deviation over seeds if there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _check(groups: Sequence[Group]) -> None:
    if not groups:
        raise BecameError("there are no finished runs to report on; give at least one.")
    first = groups[0].runs[0]
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            raise BecameError(f"a run of {shown(group.label)} with one seed is there twice; leave one out.")
        for run in group.runs:
            ours, theirs = ((each.benchmark, len(each.accuracy)) for each in (first, run))
            if ours != theirs:
                raise BecameError(
                    f"{shown(run.method)} learned {theirs[1]} tasks of {shown(theirs[0])}, where {shown(first.method)} "
                    f"learned {ours[1]} of {shown(ours[0])}; report on one benchmark at a time."
                )


def _labels(runs: Sequence[RunResult]) -> list[str]:
    """Each group's method, and if others share it, up to two values in which it differs from them, or a number."""
    labels = []
    for run in runs:
        alike = [_values(other) for other in runs if other.method == run.method]
        own = _values(run)
        differing = [name for name in own if any(other.get(name) != own[name] for other in alike)]
        label = run.method
        if len(alike) > 1:
            told = ", ".join(f"{name} {own[name]}" for name in differing[:2])
            label = f"{run.method} ({told or 'other configuration'})"
        labels.append(label)
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[: place + 1].count(label)}"
        for place, label in enumerate(labels)
    ]


def _values(run: RunResult) -> dict[str, Any]:
    """A run's configuration as one level: ``stage1.epochs``."""
    flat: dict[str, Any] = {"backend": run.backend}
    for name, value in run.config.items():
        nested = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{inner}".rstrip("."): each for inner, each in nested.items()}
    return flat
