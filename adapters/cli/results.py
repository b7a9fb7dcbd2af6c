"""The tables at the end of a command: what its runs reached, what they cost, and in words what the columns mean.

Convention: accuracies are in percent, and losses have their sign turned; over several seeds a number is ``mean ±
standard deviation``. Two narrow tables rather than one, because a method of three seeds must fit a terminal of 80
columns.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import zip_longest

from adapters.analysis.bootstrap import Estimate
from adapters.analysis.comparison import ACCURACIES, CORRELATION
from adapters.analysis.groups import labelled
from adapters.analysis.tables import Cell, Column, Table
from adapters.runs import RunResult, Scores

__all__ = ["results_tables"]

_AMONG = "task, class: whether the model chooses among the classes of the image's own task, or of all tasks."
_LOSSES = (
    "−{unit}: the mean {unit} on all tasks after the last one, with its sign turned so that up is good, as in all "
    "columns. BWT: how much it has changed since a task was learned; forgetting: how far it fell below its best. "
    "plasticity: the mean just after a task was learned."
)
_ALPHA = (
    "α: how far each task's merge went from stage 1's model, which is trained under gradient projection, to stage 2's, "
    "which is trained freely. At α = 0 stage 2 was thrown away; at α = 1 stage 1's constraint was given up; – is for a "
    "task that was not merged, as the first never is."
)
_FOUND = (
    "A segment is what comes between two announced changes; one that is known was not learned again. A row of the "
    "accuracies is a segment that was learned; it is tested on as large a share of a task as it has of its training "
    "samples. The delay is the number of batches from a change until it was announced."
)


def results_tables(results: Sequence[RunResult]) -> list[Table]:
    """Return the scores, two rows a method (one of losses), and what the methods did and cost, in the order given.

    Runs of several benchmarks have tables of their own.
    """
    alike: dict[tuple[str, str], list[RunResult]] = {}
    for run in results:
        alike.setdefault((run.benchmark, _scored_on(run)), []).append(run)
    return [
        replace(table, title=f"{benchmark}: {table.title}") if len(alike) > 1 else table
        for (benchmark, _), runs in alike.items()
        for table in _tables_of_one(runs)
    ]


def _scored_on(run: RunResult) -> str:
    """Return what a title adds if a run was not scored on test samples."""
    return "" if run.on_test_samples else " on held-out training samples"


def _tables_of_one(results: Sequence[RunResult]) -> list[Table]:
    measure, groups = results[0].measure, labelled(results)
    seeds = sorted({result.seed for result in results})
    # If rows have different seeds, as after a run that failed, each says how many it has.
    are_alike = all(sorted(run.seed for run in runs) == seeds for _, runs in groups)
    scores: list[list[Cell]] = []
    costs: list[list[Cell]] = []
    for label, runs in groups:
        counted: list[Cell] = [] if are_alike else [str(len(runs))]
        scores.append([label, *counted, "task", *_estimates([run.scores for run in runs])])
        if measure.is_accuracy:
            empty = ["" for _ in counted]
            scores.append(["", *empty, "class", *_estimates([run.class_incremental_scores for run in runs])])
        else:  # there is no choice among classes
            del scores[-1][1 + len(counted)]
        epochs = Estimate(tuple(float(sum(run.epochs)) for run in runs))
        seconds = Estimate(tuple(run.seconds["total"] for run in runs))
        costs.append([label, _mean_alphas(runs), epochs, seconds])
    merged = any(alpha is not None for run in results for alpha in run.alpha)
    headings = (measure.heading, "BWT", "forgetting", "plasticity")
    names = ["method", *([] if are_alike else ["seeds"]), *(["among"] if measure.is_accuracy else [])]
    score_columns = [*map(Column, names), *(Column(heading, measure.digits) for heading in headings)]
    cost_columns = [Column("method"), Column("α of each task", prose=True), Column("epochs", 0), Column("seconds", 1)]
    if not merged:
        del cost_columns[1]
        costs = [[method, *others] for method, _, *others in costs]
    note = f"{ACCURACIES} {_AMONG}"
    several = f" over seeds {', '.join(map(str, seeds))}" if are_alike else " over the seeds of each row"
    of_seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± standard deviation{several}"
    title, section = f"Accuracies{_scored_on(results[0])} in percent, {of_seeds}", 2
    if not measure.is_accuracy:
        note = _LOSSES.format(unit=measure.unit)
        correlations = [_correlation(runs) for _, runs in groups]
        if any(correlations):
            score_columns.append(Column("correlation", measure.digits))
            scores = [[*row, cell] for row, cell in zip(scores, correlations, strict=True)]
            note += f" correlation: {CORRELATION}."
        title, section = f"Losses{_scored_on(results[0])}, {measure.unit}, with the sign turned, {of_seeds}", 0
    return [
        Table(title, score_columns, scores, [note], section=section),
        Table("What was merged, and the cost" if merged else "The cost", cost_columns, costs, [_ALPHA] * merged),
        *_found(results),
    ]


def _found(results: Sequence[RunResult]) -> list[Table]:
    """Return a table of what the detector found in each seed's stream, which all methods learn; none if none was."""
    streams = {result.seed: result.boundaries for result in results if result.boundaries is not None}
    rows: list[list[Cell]] = []
    for seed, found in sorted(streams.items()):
        again = sum(segment["known"] is not None for segment in found["segments"])
        delays = " ".join("missed" if delay is None else str(delay) for delay in found["delays"]) or "–"
        rows.append([str(seed), f"{len(found['segments'])}", f"{again}", delays, f"{found['false_alarms']}"])
    columns = ["seed", "segments", "known", "delay of each change", "false alarms"]
    title = "What was found in the streams, in batches"
    return [Table(title, [Column(name) for name in columns], rows, [_FOUND])] if rows else []


def _estimates(scores: Sequence[Scores]) -> list[Estimate]:
    names = ("acc", "bwt", "forgetting", "plasticity")
    return [Estimate(tuple(asdict(score)[name] for score in scores)) for name in names]


def _correlation(runs: Sequence[RunResult]) -> Estimate | None:
    known = [run.mean_correlation for run in runs if run.mean_correlation is not None]
    return Estimate(tuple(known)) if known else None


def _mean_alphas(runs: Sequence[RunResult]) -> str:
    """Each task's mean coefficient over seeds, a dash where nothing was merged; empty if nothing ever was."""
    # Without announced boundaries, seeds may have different numbers of tasks.
    alphas = list(zip_longest(*(run.alpha for run in runs)))
    if all(alpha is None for task in alphas for alpha in task):
        return ""
    means = [[alpha for alpha in task if alpha is not None] for task in alphas]
    return " ".join(f"{sum(task) / len(task):.2f}" if task else "–" for task in means)
