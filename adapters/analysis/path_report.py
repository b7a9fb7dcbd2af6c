"""The path report of a run: the true loss and accuracy along every merging path, and the alpha of every estimator.

Convention: losses are sums over tasks of mean training losses; accuracies are means over tasks, in percent. What an
estimator's alpha would have given is interpolated linearly between the traced points. Its regret is how much worse that
is than the best traced point.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adapters.analysis.bootstrap import Estimate
from adapters.analysis.tables import Cell, Column, Table
from adapters.runs import RunResult
from adapters.runs.directory import finished_runs
from became_core import BecameError
from became_core.continual import Along, alpha_estimates

__all__ = [
    "calibration_table",
    "curve_table",
    "estimated_alphas",
    "estimator_table",
    "merged_tasks",
    "path_table",
    "regret",
    "regret_table",
    "traced_tasks",
    "write_paths",
]


def merged_tasks(result: RunResult) -> list[int]:
    """Return the numbers, from 1, of the tasks after which the run merged at an alpha."""
    return [task for task, alpha in enumerate(result.alpha, start=1) if alpha is not None]


def traced_tasks(result: RunResult) -> list[int]:
    """Return the numbers, from 1, of the tasks whose merging paths were traced: all but the first, if any."""
    return list(range(2, len(result.paths) + 2))


def path_table(result: RunResult) -> Table:
    """Return the loss and the accuracy at each traced alpha, for every merge of a run."""
    columns = [Column("into task", 0), Column("")]
    columns += [Column(f"α={point['alpha']:.2g}", 3) for point in result.paths[0]["points"]]
    rows = []
    for task, path in zip(traced_tasks(result), result.paths, strict=True):
        rows.append([str(task), "loss", *(f"{point['loss']:.3f}" for point in path["points"])])
        rows.append(["", "accuracy", *(f"{point['accuracy']:.2f}" for point in path["points"])])
    return Table(f"{result.method}-seed{result.seed}: the truth along the merging paths", columns, rows, section=2)


def estimator_table(result: RunResult) -> Table:
    """Return every estimator's alpha at each merge and its mean regrets; the least regret in accuracy comes first."""
    alphas = estimated_alphas(result.paths)
    points = {name: regret(result.paths, values, "accuracy") for name, values in alphas.items()}
    columns = [Column("estimator (new side / old side)")]
    columns += [Column(f"α into {task}", 2) for task in traced_tasks(result)]
    columns += [Column("regret, points", 2), Column("in loss", 3)]
    rows: list[list[Cell]] = []
    for name in sorted(alphas, key=lambda name: points[name]):
        numbers = [*alphas[name], points[name], regret(result.paths, alphas[name], "loss")]
        rows.append([name, *(Estimate((number,)) for number in numbers)])
    return Table(f"{result.method}-seed{result.seed}: what estimators make of them", columns, rows)


def regret_table(result: RunResult, what: Literal["accuracy", "loss"]) -> Table:
    """Return every estimator's regret at each merge, and the mean over merges; the least mean comes first.

    The alpha that the run itself merged at is a row as well, if it has one, and so are the constants 0, 1/2 and 1.

    Args:
        result: a run whose paths were traced.
        what: "accuracy", in points, or "loss".
    """
    merged = [result.alpha[task - 1] for task in traced_tasks(result)]
    alphas = {f"constant {alpha:g}": [alpha] * len(merged) for alpha in (0.0, 0.5, 1.0)}
    alphas |= {"the run": [float(alpha or 0.0) for alpha in merged]} if None not in merged else {}
    alphas |= estimated_alphas(result.paths)
    by_task = {
        name: [regret([path], [alpha], what) for path, alpha in zip(result.paths, values, strict=True)]
        for name, values in alphas.items()
    }
    digits = 2 if what == "accuracy" else 3
    columns = [Column("alpha of"), *(Column(f"into {task}", digits) for task in traced_tasks(result))]
    rows: list[list[Cell]] = [
        [name, *(Estimate((number,)) for number in (*by_task[name], float(np.mean(by_task[name]))))]
        for name in sorted(by_task, key=lambda name: float(np.mean(by_task[name])))
    ]
    unit = "points of accuracy" if what == "accuracy" else "loss"
    title = f"{result.method}-seed{result.seed}: regret in {unit}, merge by merge"
    return Table(title, [*columns, Column("mean", digits)], rows)


def calibration_table(result: RunResult) -> Table:
    """Return by how much the old tasks' true slope and curvature exceed those of their diagonals, at each merge.

    The curvature's ratio is what kappa stands for. Beside it is kappa as ``Secant`` measures it on the new task, along
    the task's own movement. A ratio to a slope that is zero is not shown.

    Args:
        result: a run whose paths were traced.
    """
    columns = [Column("into task", 0), Column("κ, of the new task", 2)]
    columns += [
        Column(f"true {what} / that of {side}", 2) for side in _KNOWN.values() for what in ("curvature", "slope")
    ]
    rows: list[list[Cell]] = []
    for task, path in zip(traced_tasks(result), result.paths, strict=True):
        new, old = _sides(path)
        pairs = [(new["exact"].curvature, new["diagonal"].curvature)]
        for side in _KNOWN:
            pairs += [(old["exact"].curvature, old[side].curvature), (old["exact"].slope, old[side].slope)]
        rows.append([str(task), *(Estimate((true / known,)) if known else None for true, known in pairs)])
    return Table(f"{result.method}-seed{result.seed}: what the old tasks' approximations miss", columns, rows)


# The approximations of the old tasks' loss that a continual learner can keep, and what a table calls them.
_KNOWN = {"diagonal": "the diagonal", "kronecker": "Kronecker factors"}


def curve_table(result: RunResult) -> Table:
    """Return what the curve beside the segment promised at each merge and what it gave.

    The predicted advantage is that of the mode over the best of the segment, both by the two sides' diagonals. The
    measured one is that of the true loss at the same two points; below 0, the mode is worse.

    Args:
        result: a run whose paths were traced.
    """
    alphas = estimated_alphas(result.paths)["published, diagonal"]
    columns = [Column("into task", 0), Column("predicted advantage", 2), Column("measured", 3)]
    columns += [Column(f"least loss of the {path}", 3) for path in ("segment", "curve")]
    columns += [Column(f"best accuracy of the {path}", 2) for path in ("segment", "curve")]
    rows: list[list[Cell]] = []
    for task, path, alpha in zip(traced_tasks(result), result.paths, alphas, strict=True):
        traced = [path["points"], path["curve"]]
        losses = [np.array([point["loss"] for point in points]) for points in traced]
        places = [point["alpha"] for point in path["points"]]
        measured = np.interp(alpha, places, losses[0]) - np.interp(0.5, places, losses[1])
        best = [max(point["accuracy"] for point in points) for points in traced]
        numbers = [measured, losses[0].min(), losses[1].min(), *best]
        rows.append([str(task), f"{path['predicted_advantage']:.2g}", *(Estimate((float(n),)) for n in numbers)])
    return Table(f"{result.method}-seed{result.seed}: the curve beside the segment", columns, rows, section=1)


def write_paths(outs: Sequence[Path], into: Path | None = None) -> tuple[list[Table], list[Path]]:
    """Return the tables of every traced run, and write a figure of each run's paths.

    Args:
        outs: folders that ``--out`` named.
        into: the folder of the figures; that of the run if None. A figure is ``paths-METHOD-seedSEED.svg``; the name of
            the run's folder is added where two runs have the same name.

    Raises:
        BecameError: if no run has traced its paths, a folder has no runs, or a file cannot be written.
    """
    from adapters.analysis.figures.drawing import picture, themed_svg  # needs matplotlib, which is an extra
    from adapters.analysis.figures.training import plot_path

    traced = [(out, run) for out in outs for run in finished_runs([out]) if run.paths]
    if not traced:
        raise BecameError("no run in these folders has traced its merging paths; run with --path-points 11.")
    tables: list[Table] = []
    written: list[Path] = []
    for out, run in traced:
        tables += _tables(out, run)
        # No method's name can lead out of the folder.
        stem = f"paths-{re.sub(r'[^A-Za-z0-9.+_-]+', '-', run.method)}-seed{run.seed}"
        ends = chain(("", f"-{out.name}"), (f"-{out.name}-{number}" for number in count(2)))
        file = next(file for end in ends if (file := (into or out) / f"{stem}{end}.svg") not in written)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(themed_svg(picture(plot_path([run]), "svg")))
        except OSError as error:
            raise BecameError(f"{file} cannot be written: {error.strerror}.") from None
        written.append(file)
    return tables, written


def _tables(out: Path, run: RunResult) -> list[Table]:
    """Return the tables of a run's paths.

    Raises:
        BecameError: if a path was not measured in a way that a table compares.
    """
    try:
        tables = [path_table(run), estimator_table(run), regret_table(run, "accuracy"), regret_table(run, "loss")]
        tables.append(calibration_table(run))
        return tables + ([curve_table(run)] if all(path.get("curve") for path in run.paths) else [])
    except KeyError as error:
        raise BecameError(
            f"the paths of {run.method} with seed {run.seed} in {out} lack {error}; trace them with this version."
        ) from None


def estimated_alphas(paths: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return each estimator's alpha at each merge, the best traced alpha by loss among them."""
    estimates = [alpha_estimates(*_sides(path)) for path in paths]
    alphas = {name: [estimate[name] for estimate in estimates] for name in estimates[0]}
    best = [min(path["points"], key=lambda point: point["loss"])["alpha"] for path in paths]
    return alphas | {"grid, by loss": best}


def _sides(path: Mapping[str, Any]) -> tuple[dict[str, Along], dict[str, Along]]:
    """Return the loss of the new task and of the old ones along a path, by each way to measure it."""
    new, old = ({name: Along(*along) for name, along in path[side].items()} for side in ("new", "old"))
    return new, old


def regret(paths: Sequence[Mapping[str, Any]], alphas: Sequence[float], what: str) -> float:
    """Return how much worse these alphas are than the best traced point, as a mean over merges.

    Args:
        paths: the traced paths.
        alphas: one for each path.
        what: "accuracy", in points, or "loss".
    """
    regrets = []
    for path, alpha in zip(paths, alphas, strict=True):
        grid, truth = (np.array([point[key] for point in path["points"]]) for key in ("alpha", what))
        value = np.interp(alpha, grid, truth)
        regrets.append(truth.max() - value if what == "accuracy" else value - truth.min())
    return float(np.mean(regrets))
