"""The comparison of finished runs: methods by metrics over seeds, differences to a baseline, the published numbers.

Convention: runs of one method, backend and configuration are one row, whatever folder they are in, and differ in their
seeds; where a method has several rows, its label names the folder. Accuracies are in percent, memory in MiB. The tables
are several and narrow, so that three seeds fit 100 columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from adapters.analysis.bootstrap import LEVEL, RESAMPLES, Estimate, paired_difference
from adapters.analysis.groups import Group, groups_of, have_spread
from adapters.analysis.tables import Cell, Column, Table
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.runs import RunResult, finished_runs
from adapters.runs.published import PublishedTable, published_tables
from became_core import BecameError
from became_core.continual.metrics import backward_transfer, forward_transfer, plasticity

__all__ = ["ACCURACIES", "CORRELATION", "comparison", "gather", "heading", "published_table", "scores_tables"]

# What the scores of accuracies mean, in the words of every table.
ACCURACIES = (
    "ACC: the mean accuracy on all tasks after the last one. BWT: how much the accuracy has changed since a task was "
    "learned; forgetting: how much it has fallen below its best; both are means over all tasks but the last. "
    "plasticity: the mean accuracy on a task just after it was learned."
)

_LOSS_NOTE = (
    "Means over all tasks, of the same samples, in nats. loss: after the last task; as learned: just after each was "
    "learned; rise: by how much the loss has risen since then, without the last task."
)
CORRELATION = "Pearson's, of predictions with targets, the mean over all tasks after the last one"


@dataclass(frozen=True)
class _Metric:
    heading: str
    digits: int
    of: Callable[[RunResult], float | None]

    @property
    def column(self) -> Column:
        return Column(self.heading, self.digits)

    def estimate(self, group: Group) -> Estimate | None:
        values = group.values(self.of)
        return Estimate(tuple(values.values())) if values else None


_SCORES = (
    _Metric("ACC", 2, lambda run: run.scores.acc),
    _Metric("BWT", 2, lambda run: run.scores.bwt),
    _Metric("forgetting", 2, lambda run: run.scores.forgetting),
    _Metric("plasticity", 2, lambda run: run.scores.plasticity),
    _Metric("last task", 2, lambda run: float(run.measured[-1, -1])),
    _Metric("FWT", 2, lambda run: forward_transfer(run.measured)),
    _Metric("class-inc.", 2, lambda run: run.class_incremental_scores.acc if run.measure.is_accuracy else None),
    _Metric("correlation", 3, lambda run: run.mean_correlation),
)
_LOSS = _Metric("loss", 3, lambda run: run.mean_loss)
# A merge minimises the loss. The same means are taken of it as of accuracies.
_LOSSES = (
    _LOSS,
    _Metric("as learned", 3, lambda run: plasticity(run.loss) if len(run.loss) else None),
    _Metric("rise", 3, lambda run: backward_transfer(run.loss) if len(run.loss) > 1 else None),
)
_COSTS = (
    _Metric("epochs", 0, lambda run: float(sum(run.epochs))),
    _Metric("seconds", 0, lambda run: run.seconds["total"]),
    _Metric("memory", 1, lambda run: run.memory[-1] / 2**20 if run.memory else None),
)


def heading(run: RunResult) -> str:
    """Return the benchmark of a run and its tasks: of how many, how many the run learned, and on what it was scored."""
    tasks, first = _tasks_of(run)
    counted = f"{tasks or first} {'task' if (tasks or first) == 1 else 'tasks'}"
    if tasks is None:
        counted = "the first task" if first == 1 else f"the first {counted}"
    elif first != tasks:
        counted += f", the first {first}"
    return f"{run.benchmark}, {counted}" + ("" if run.on_test_samples else ", scored on held-out training samples")


def _tasks_of(run: RunResult) -> tuple[int | None, int]:
    """Return into how many tasks the data were cut, None if that is not known, and how many of them the run learned."""
    learned = len(run.accuracy)
    tasks, first = run.config.get("tasks", learned), run.config.get("first", learned)
    # 0 stands for as many tasks as the data have domains, and for all of them.
    return tasks or (None if first else learned), first or learned


def scores_tables(groups: Sequence[Group]) -> list[Table]:
    """Return the scores of each group and what they cost, a row each; a metric that no run has is left out."""
    measure, scores = groups[0].measure, [*_SCORES]
    note = (
        f"Accuracies in percent. {ACCURACIES} last task: that of the last task alone; class-inc.: ACC where the model "
        "chooses among the classes of all tasks."
    )
    if not measure.is_accuracy:
        scores[:1] = [replace(_LOSS, heading=measure.unit), replace(_SCORES[0], heading=measure.heading)]
        scores = [replace(metric, digits=measure.digits) if metric.digits == 2 else metric for metric in scores]
        correlated = any(run.mean_correlation is not None for group in groups for run in group.runs)
        others = f"{measure.unit} and correlation" if correlated else measure.unit
        note = f"Columns but {others} are of {measure.name}: up is good, and below 0 a BWT is forgetting."
        note += f" correlation: {CORRELATION}." if correlated else ""
    spread = "Mean ± standard deviation over seeds. " if have_spread(groups) else ""
    remembered = any(run.memory for group in groups for run in group.runs)
    memory = "Memory in MiB, beside the network's own." if remembered else ""
    tables = [_metrics_table(heading(groups[0].runs[0]), scores, groups, spread + note)]
    if measure.is_accuracy and any(len(run.loss) for group in groups for run in group.runs):
        tables.append(_metrics_table("The loss", _LOSSES, groups, _LOSS_NOTE))
    return [*tables, _metrics_table("The cost", _COSTS, groups, memory)]


def _metrics_table(title: str, metrics: Sequence[_Metric], groups: Sequence[Group], note: str) -> Table:
    """Return a table of those metrics that any group has."""
    metrics = [metric for metric in metrics if any(metric.estimate(group) for group in groups)]
    rows = [[group.label, str(len(group.runs)), *(metric.estimate(group) for metric in metrics)] for group in groups]
    columns = [Column("method"), Column("seeds"), *(metric.column for metric in metrics)]
    return Table(title, columns, rows, [note] if note else [])


def gather(outs: Sequence[Path]) -> list[Group]:
    """Return the finished runs of these folders by row, in the order in which they are met.

    Raises:
        BecameError: if a folder has no runs, two runs cannot be compared, or one is there twice.
    """
    folders: dict[int, Path] = {}
    runs: list[RunResult] = []
    for out in outs:
        for run in finished_runs([out]):
            for other in runs:
                _check_comparable(other, run, out)
            twin = next((other for other in runs if _identity(other) == _identity(run)), None)
            if twin is not None:
                raise BecameError(f"{run.method} with seed {run.seed} is there twice, again in {out}; leave one out.")
            runs.append(run)
            folders[id(run)] = out
    groups = groups_of(runs)
    methods = [group.runs[0].method for group in groups]
    one_backend = len({run.backend for run in runs}) == 1
    short, names = _told_apart(list(dict.fromkeys(folders.values()))), list[str]()
    for group in groups:
        run = group.runs[0]
        folder = short[folders[id(run)]]
        whence = folder if one_backend else f"{folder}, {run.backend}"
        name = run.method if methods.count(run.method) == 1 else f"{run.method} ({whence})"
        # One folder can have several configurations of a method, of different seeds.
        again = sum(other == name or other.startswith(f"{name} #") for other in names)
        names.append(f"{name} #{again + 1}" if again else name)
    return [replace(group, label=name) for group, name in zip(groups, names, strict=True)]


def _told_apart(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the last parts of each folder's path, as many as tell all of them apart."""
    parts = {folder: folder.absolute().parts for folder in folders}
    for count in range(1, max(map(len, parts.values())) + 1):
        names = {folder: "/".join(each[-count:]) for folder, each in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def _identity(run: RunResult) -> tuple[object, ...]:
    return run.method, run.backend, run.config, run.seed


_SAMPLES = {True: "test samples", False: "held-out training samples"}

# What all runs of a table must agree in, what a configuration has that was recorded before it could be chosen, and the
# end of the sentence that refuses other runs.
_ALIKE = (
    ("class_order", "label", "of one class split"),
    ("single_head", False, "that all have one head, or all a head for each task"),
    ("boundaries", "known", "whose boundaries are all known, or all unknown"),
)


def _check_comparable(first: RunResult, run: RunResult, out: Path) -> None:
    if run.benchmark != first.benchmark:
        raise BecameError(
            f"{out} holds runs of {run.benchmark}, the others are of {first.benchmark}; compare runs of one benchmark."
        )
    if run.unit != first.unit:
        raise BecameError(
            f"{out} holds runs that are measured in {run.unit}, the others in {first.unit}; compare runs of one unit."
        )
    if run.on_test_samples != first.on_test_samples:
        raise BecameError(
            f"{out} holds runs that were scored on {_SAMPLES[run.on_test_samples]}, the others on "
            f"{_SAMPLES[first.on_test_samples]}; compare runs with one --score-on."
        )
    _check_tasks(first, run, out)
    for name, default, whose in _ALIKE:
        ours, theirs = first.config.get(name, default), run.config.get(name, default)
        if ours != theirs:
            raise BecameError(f"{out} holds runs with {name} = {theirs}, the others have {ours}; compare runs {whose}.")
    # An earlier version did not record the data.
    if None not in (first.data, run.data) and first.data != run.data and not _are_views(first, run):
        raise BecameError(f"{out} holds runs on other data than the others; compare runs on the same data.")


def _check_tasks(first: RunResult, run: RunResult, out: Path) -> None:
    """Check that two runs learned equally many tasks of equally many, as far as their configurations say it."""
    for name, ours, theirs in zip(("tasks", "first"), _tasks_of(first), _tasks_of(run), strict=True):
        chosen = first.config.get(name) != run.config.get(name)
        if chosen and None not in (ours, theirs) and ours != theirs:
            raise BecameError(
                f"{out} holds runs with {name} = {theirs}, the others have {ours}; compare runs of one class split."
            )


def _are_views(first: RunResult, run: RunResult) -> bool:
    """Whether the data of two runs may be of one source though they differ, because a user chose other views of it."""
    views = BENCHMARKS[run.benchmark].views if run.benchmark in BENCHMARKS else ()
    return any(first.config.get(name) != run.config.get(name) for name in views)


def comparison(groups: Sequence[Group], baseline: str | None = None) -> list[Table]:
    """Return the tables of a comparison: scores, differences to the baseline if there is one, published numbers.

    Raises:
        BecameError: if there is no such baseline.
    """
    run = groups[0].runs[0]
    tables = scores_tables(groups)
    if baseline is not None:
        tables.append(_differences(groups, baseline))
    tasks, first = _tasks_of(run)
    published = published_tables(run.benchmark, first) if first == tasks and run.on_test_samples else []
    if published:
        tables.append(published_table(published, f"Published: {heading(run)}"))
    return tables


def _differences(groups: Sequence[Group], baseline: str) -> Table:
    against = next((group for group in groups if group.label == baseline), None)
    if against is None:
        labels = ", ".join(f"'{group.label}'" for group in groups)
        raise BecameError(f"there is no baseline '{baseline}'; choose from {labels}.")
    measure = groups[0].measure
    rows: list[list[Cell]] = []
    for metric in (*_SCORES, _LOSS) if measure.is_accuracy else _SCORES:
        name = measure.heading if metric is _SCORES[0] else metric.heading
        for group in groups:
            if metric.estimate(against) and group is not against:
                pairs = group.values(metric.of), against.values(metric.of)
                difference = paired_difference(*pairs)
                if difference is not None and metric is _LOSS:
                    difference = replace(difference, digits=_LOSS.digits)
                rows.append([name, group.label, str(len(set(pairs[0]) & set(pairs[1]))), difference])
    columns = [Column("score"), Column("method"), Column("seeds"), Column("difference", measure.digits)]
    notes = [
        f"Differences by seed; [middle {LEVEL:.0%} of {RESAMPLES:,} bootstrap means over the seeds that both have]. "
        "Of one seed there is no interval, and of a few it is too narrow."
    ]
    section = len(groups) - 1
    return Table(f"Difference to {baseline}", columns, rows, notes, intervals=True, section=section)


def published_table(tables: Sequence[PublishedTable], title: str) -> Table:
    """Return published numbers of one benchmark as one table, with the sources and protocols as notes."""
    rows: list[list[Cell]] = []
    for number, table in enumerate(tables, start=1):
        for method, scores in table.methods.items():
            numbers = asdict(scores).values()
            rows.append([method, str(number), *(None if value is None else Estimate((value,)) for value in numbers)])
    notes = [f"{number}: {table.source}. Protocol: {table.protocol}" for number, table in enumerate(tables, start=1)]
    notes.append("Numbers of different protocols, ours among them, are not to be compared closely.")
    headings = ("ACC", "BWT", "forgetting", "plasticity, last task")
    columns = [Column("method"), Column("source"), *(Column(heading, 2) for heading in headings)]
    return Table(title, columns, rows, notes)
