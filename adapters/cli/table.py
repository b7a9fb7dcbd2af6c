"""The table that a comparison ends with: methods by metrics, task- and class-incremental."""

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from adapters.runs import RunResult

__all__ = ["comparison_table"]

_SCORES = ("acc", "bwt", "forgetting", "plasticity")


def comparison_table(results: Sequence[RunResult]) -> Table:
    """Return two rows for each method, in the order given; mean ± standard deviation where there are several seeds."""
    table = Table(title="Accuracies in percent", title_justify="left")
    table.add_column("method")
    table.add_column("incremental")
    for heading in ("ACC", "BWT", "forgetting", "plasticity"):
        table.add_column(heading, justify="right")
    table.add_column("α per task")
    table.add_column("epochs", justify="right")
    table.add_column("seconds", justify="right")
    for method in dict.fromkeys(result.method for result in results):
        runs = [result for result in results if result.method == method]
        table.add_row(
            method,
            "task",
            *(_spread([getattr(run.scores, name) for run in runs]) for name in _SCORES),
            _alphas(runs),
            _spread([float(sum(run.epochs)) for run in runs], digits=0),
            _spread([run.seconds["total"] for run in runs], digits=0),
        )
        table.add_row(
            "",
            "class",
            *(_spread([getattr(run.class_incremental_scores, name) for run in runs]) for name in _SCORES),
            end_section=True,
        )
    return table


def _spread(values: Sequence[float], digits: int = 2) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _alphas(runs: Sequence[RunResult]) -> str:
    """Return each task's mean coefficient over seeds, a dash where nothing was merged; blank if nothing ever was."""
    columns = list(zip(*(run.alpha for run in runs), strict=True))
    if all(alpha is None for column in columns for alpha in column):
        return ""
    return " ".join("–" if column[0] is None else f"{np.mean(column):.2f}" for column in columns)
