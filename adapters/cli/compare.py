"""The comparison of finished runs: methods by metrics over seeds, differences to a baseline, the published numbers.

Convention: runs of one method, backend and configuration are one row, whatever folder they are in, and differ in their
seeds; where a method has several rows, its label names the folder. Accuracies are in percent, memory in MiB.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.analysis.bootstrap import LEVEL, RESAMPLES, estimate, paired_difference
from adapters.cli.rendering import Column, Sheet
from adapters.runs import RunResult, read_results
from adapters.runs.published import published_tables
from became_core import BecameError
from became_core.continual.metrics import forward_transfer

__all__ = ["Group", "comparison", "gather"]


@dataclass(frozen=True)
class Group:
    """The runs of one row.

    Attributes:
        label: what the row is called.
        runs: by seed.
    """

    label: str
    runs: dict[int, RunResult]


@dataclass(frozen=True)
class _Metric:
    heading: str
    digits: int
    of: Callable[[RunResult], float | None]
    compared: bool = True  # with a baseline


_METRICS = (
    _Metric("ACC", 2, lambda run: run.scores.acc),
    _Metric("BWT", 2, lambda run: run.scores.bwt),
    _Metric("forgetting", 2, lambda run: run.scores.forgetting),
    _Metric("plasticity", 2, lambda run: run.scores.plasticity),
    _Metric("FWT", 2, lambda run: forward_transfer(run.accuracy)),
    _Metric("class-inc. ACC", 2, lambda run: run.class_incremental_scores.acc),
    _Metric("epochs", 0, lambda run: float(sum(run.epochs)), compared=False),
    _Metric("seconds", 0, lambda run: run.seconds["total"], compared=False),
    _Metric("memory", 1, lambda run: run.memory[-1] / 2**20 if run.memory else None, compared=False),
)


def gather(outs: Sequence[Path]) -> list[Group]:
    """Return the finished runs of these folders by row, in the order in which they are met.

    Raises:
        BecameError: if a folder has no runs, two runs cannot be compared, or one is there twice.
    """
    found: dict[tuple[str, str, str], tuple[Path, dict[int, RunResult]]] = {}
    first: RunResult | None = None
    for out in outs:
        results = read_results(out)
        if not results:
            raise BecameError(f"{out} holds no finished runs; give a folder that --out named.")
        for run in results:
            first = first or run
            _check_comparable(first, run, out)
            key = (run.method, run.backend, json.dumps(run.config, sort_keys=True))
            _, runs = found.setdefault(key, (out, {}))
            if run.seed in runs:
                raise BecameError(f"{run.method} with seed {run.seed} is there twice, again in {out}; leave one out.")
            runs[run.seed] = run
    methods = [method for method, _, _ in found]
    return [
        Group(method if methods.count(method) == 1 else f"{method} ({out.name}, {backend})", runs)
        for (method, backend, _), (out, runs) in found.items()
    ]


def _check_comparable(first: RunResult, run: RunResult, out: Path) -> None:
    if run.benchmark != first.benchmark:
        raise BecameError(
            f"{out} holds runs of {run.benchmark}, the others are of {first.benchmark}; compare runs of one benchmark."
        )
    # A configuration of before class orders could be chosen has none, which is label order.
    for name, usual in (("tasks", None), ("first", None), ("class_order", "label")):
        ours, theirs = first.config.get(name, usual), run.config.get(name, usual)
        if ours != theirs:
            raise BecameError(
                f"{out} holds runs with {name} = {theirs}, the others have {ours}; compare runs of one class split."
            )


def comparison(groups: Sequence[Group], baseline: str | None = None) -> list[Sheet]:
    """Return the sheets of a comparison: scores, differences to the baseline if there is one, published numbers.

    Raises:
        BecameError: if there is no such baseline.
    """
    run = next(iter(groups[0].runs.values()))
    tasks, first = int(run.config["tasks"]), int(run.config["first"])
    what = f"{run.benchmark}, {tasks} tasks" + (f", the first {first}" if first < tasks else "")
    sheets = [_scores(groups, what)]
    if baseline is not None:
        sheets.append(_differences(groups, baseline))
    return sheets + (_published(run.benchmark, tasks) if first == tasks else [])


def _values(group: Group, metric: _Metric) -> dict[int, float]:
    """A metric by seed, of the runs that have it."""
    found = {seed: metric.of(run) for seed, run in group.runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _scores(groups: Sequence[Group], what: str) -> Sheet:
    metrics = [each for each in _METRICS if any(_values(group, each) for group in groups)]
    rows: list[list[Any]] = []
    for group in groups:
        values = [list(_values(group, metric).values()) for metric in metrics]
        rows.append([group.label, str(len(group.runs)), *(estimate(each) if each else None for each in values)])
    columns = [Column("method"), Column("seeds"), *(Column(each.heading, each.digits) for each in metrics)]
    notes = ["Mean ± standard deviation over seeds; accuracies in percent, memory in MiB, beside the network's own."]
    return Sheet(what, columns, rows, notes)


def _differences(groups: Sequence[Group], baseline: str) -> Sheet:
    against = next((group for group in groups if group.label == baseline), None)
    if against is None:
        labels = ", ".join(f"'{group.label}'" for group in groups)
        raise BecameError(f"there is no baseline '{baseline}'; choose from {labels}.")
    metrics = [each for each in _METRICS if each.compared and _values(against, each)]
    rows: list[list[Any]] = []
    for group in groups:
        if group is not against:
            pairs = [paired_difference(_values(group, each), _values(against, each)) for each in metrics]
            rows.append([group.label, str(len(set(group.runs) & set(against.runs))), *pairs])
    columns = [Column("method"), Column("seeds"), *(Column(f"Δ {each.heading}", each.digits) for each in metrics)]
    notes = [
        f"Differences by seed; [middle {LEVEL:.0%} of {RESAMPLES:,} bootstrap means over the seeds that both have]. "
        "Of one seed there is no interval, and of a few it is too narrow."
    ]
    return Sheet(f"Difference to {baseline}", columns, rows, notes, intervals=True)


def _published(benchmark: str, tasks: int) -> list[Sheet]:
    tables = published_tables(benchmark, tasks)
    if not tables:
        return []
    rows: list[list[Any]] = []
    notes: list[str] = []
    for number, table in enumerate(tables, start=1):
        for method, scores in table.methods.items():
            numbers = (scores.acc, scores.bwt, scores.forgetting, scores.last_plasticity)
            rows.append([method, str(number), *(None if each is None else estimate([each]) for each in numbers)])
        notes.append(f"{number}: {table.source}. Protocol: {table.protocol}")
    notes.append("Numbers of different protocols, ours among them, are not to be compared closely.")
    headings = ("ACC", "BWT", "forgetting", "plasticity, last task")
    columns = [Column("method"), Column("source"), *(Column(heading, 2) for heading in headings)]
    return [Sheet(f"Published: {benchmark}, {tasks} tasks", columns, rows, notes)]
