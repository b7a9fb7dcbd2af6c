"""A true loss along the path between two checkpoints, and how far the chosen coefficient is from the best of a grid.

Each point of the path is a merged checkpoint of its own, written beside the result, given to the user's function and
removed again, so that a path needs no more memory than a merge.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.checkpoints.merge import MEMORY, merge_checkpoints
from adapters.checkpoints.plan import MergePlan, PlannedModel
from adapters.runs.files import write_file
from became_core import BecameError

__all__ = ["Trace", "check_traceable", "is_merged", "trace_merge"]


@dataclass(frozen=True)
class Trace:
    """A true loss along the segment between two models.

    Attributes:
        alphas: the grid's points.
        losses: at each.
        merged: the loss of the merge that was traced.
    """

    alphas: Sequence[float]
    losses: Sequence[float]
    merged: float

    @property
    def best(self) -> float:
        """The grid's best coefficient."""
        return self.alphas[self.losses.index(min(self.losses))]

    @property
    def regret(self) -> float:
        """By how much the merge's loss is above the grid's best."""
        return self.merged - min(self.losses)


def check_traceable(plan: MergePlan, points: int) -> None:
    """Refuse a path that has no two ends; raises a BecameError as ``trace_merge`` does, which calls it."""
    if len(plan.models) != 2 or plan.base_model is not None:
        raise BecameError("a path is traced between two models, without a base model.")
    if points < 2:
        raise BecameError(f"a path of {points} points has no ends; give at least 2.")


def is_merged(plan: MergePlan, out: Path) -> bool:
    """Return whether a folder has the merge of this plan already, which can then be traced without another merge."""
    return bool(_recorded(out).get("plan") == json.loads(json.dumps(plan.as_words())))


def _recorded(out: Path) -> dict[str, Any]:
    """Return what a merge has written of itself; nothing if there is none."""
    try:
        values = json.loads((out / "became_merge.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def trace_merge(
    plan: MergePlan,
    out: Path,
    points: int,
    evaluate: Callable[[Path], float],
    *,
    memory: int = MEMORY,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Evaluate a merge and a grid between its two models, and write ``became_trace.json`` into the merge's folder.

    Args:
        plan: of the merge, of two models.
        out: its folder.
        points: how many, both ends among them.
        evaluate: from a folder to the loss of the model in it.
        memory: as in ``merge_checkpoints``, like the next two.
        workers: how many threads.
        scheduler: of a Dask cluster whose workers merge.
        progress: is told how many evaluations of how many are done.

    Raises:
        BecameError: if there are not two models, fewer than two points, or a loss is no finite number; if the folder
            has no merge of this plan; or if a model is not the one that was merged.
    """
    check_traceable(plan, points)
    if not is_merged(plan, out):
        raise BecameError(f"{out} has no merge of this plan; write it there by merge_checkpoints first.")
    inputs = _recorded(out)["inputs"]
    folder = out.with_name(f".{out.name}.trace")
    alphas = [k / (points - 1) for k in range(points)]
    losses = []
    try:
        for k, alpha in enumerate(alphas):
            shutil.rmtree(folder, ignore_errors=True)
            models = [PlannedModel(m.model, w) for m, w in zip(plan.models, (1.0 - alpha, alpha), strict=True)]
            point = plan.replaced(models=tuple(models), merge_method="linear", per="model", normalize=True)
            report = merge_checkpoints(point, folder, memory=memory, workers=workers, scheduler=scheduler)
            for label, known in report.digests.items():
                if known != inputs[label]["digest"]:
                    path = inputs[label]["path"]
                    raise BecameError(f"{path} has changed since {out} was merged; merge it into another folder.")
            losses.append(_loss(evaluate, folder))
            if progress is not None:
                progress(k + 1, points + 1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    trace = Trace(alphas, losses, _loss(evaluate, out))
    values = {"alphas": alphas, "losses": losses, "merged": trace.merged, "best": trace.best, "regret": trace.regret}
    write_file(out / "became_trace.json", (json.dumps(values, indent=2) + "\n").encode())
    return trace


def _loss(evaluate: Callable[[Path], Any], folder: Path) -> float:
    value = evaluate(folder)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BecameError(f"the evaluation of {folder} returned {str(value)[:60]}, not a finite number.")
    return number
