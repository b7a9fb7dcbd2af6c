"""What a method is: a value composed of a projector, a penalty and a merging rule, which ``learn`` carries out.

Nothing here knows a method by name; ``recipes`` has what methods are built from, and ``building`` builds them by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from became_core.arrays import Params, namespace
from became_core.continual.measurement import Structure
from became_core.continual.step import Penalty
from became_core.continual.tempering import Tempering
from became_core.curvature import FisherKind
from became_core.errors import BecameError
from became_core.laplace import (
    Diagonal,
    LaplacePosterior,
    MergeRule,
    Precision,
)
from became_core.laplace.rules import precision_weighted_mean
from became_core.projection import Projector

__all__ = ["Method", "Transfer"]


@dataclass(frozen=True)
class Transfer:
    """How a task's own model depends on that of the task before, in methods that merge the tasks' models (Lee 2017).

    Attributes:
        weights: whether training begins at the unmerged model of the task before (weight-transfer); if not, it begins
            at the initial weights.
        pull: the strength of the penalty pull/2 |theta - theta_{t-1}|^2 in training (L2-transfer).

    Raises:
        BecameError: if the strength is negative.
    """

    weights: bool = True
    pull: float = 0.0

    def __post_init__(self) -> None:
        """Check the strength."""
        if not self.pull >= 0:
            raise BecameError(f"the strength of L2-transfer is {self.pull}; it must be at least 0.")

    def models_after(self, models: Mapping[str, Params], before: Params, after: Params) -> dict[str, Params]:
        """Return the models that later tasks need, by the names "initial" and "previous".

        Args:
            models: what this method returned after the task before; empty for the first task.
            before: the weights that the task began with.
            after: the unmerged model of the task.
        """
        initial = {} if self.weights else {"initial": models.get("initial", before)}
        return initial | ({"previous": after} if self.weights or self.pull else {})

    def start(self, models: Mapping[str, Params], merged: Params, heads: frozenset[str]) -> Params:
        """Return the weights that training begins with: a stored model, but with the heads of the merged model."""
        model = models["previous" if self.weights else "initial"]
        return {name: value if name in heads else model[name] for name, value in merged.items()}

    def penalty(self, models: Mapping[str, Params], heads: frozenset[str]) -> Penalty | None:
        """Return the penalty on leaving the model of the task before, without its heads; None if ``pull`` is 0."""
        if not self.pull:
            return None
        mean = models["previous"]
        curvature = {}
        for name, value in mean.items():
            xp = namespace(mean=value)
            curvature[name] = xp.zeros_like(value) if name in heads else xp.ones_like(value)
        return Penalty(LaplacePosterior(mean, Diagonal(curvature)), self.pull)


@dataclass(frozen=True)
class Method:
    """How a new task is learned.

    Attributes:
        name: the name by which ``build_method`` makes it.
        projector: the projector, with an empty memory; from the second task on it projects stage 1. None for none.
        penalty_strength: the strength of the penalty on leaving the Laplace posterior in stage 1; 0 for no penalty.
        rule: the rule that merges; None if nothing is merged.
        merges: what the rule merges: the weights of stage 1 and stage 2 ("stages"), or the old model and the new task's
            own model ("tasks").
        transfer: what a task's own model begins with and is drawn to; None if it begins with the merged model.
        fisher: the kind of diagonal Fisher information for the posterior and the rule.
        precision: the structure of the posterior's curvature.
        decay: the factor that old curvature is multiplied by at each task.
        calibrates: whether a task's curvature is calibrated along the movement of the task before when it is
            remembered; ``calibration`` has the formula.
        temper: how held-out samples temper the curvature of tasks whose stages are merged; ``tempering`` has the
            formulas.
        recentred: whether the mean of the posterior is the latest weights; if not, it is the minimum of all tasks'
            quadratics.
        joint: whether the data of earlier tasks are trained on as well.
    """

    name: str
    projector: Projector | None = None
    penalty_strength: float = 0.0
    rule: MergeRule | None = None
    merges: Literal["stages", "tasks"] = "stages"
    transfer: Transfer | None = None
    fisher: FisherKind = "empirical"
    precision: Structure = "diagonal"
    decay: float = 1.0
    calibrates: bool = field(default=False, metadata={"later": True})
    temper: Tempering = "none"
    recentred: bool = True
    joint: bool = False

    def __post_init__(self) -> None:
        """Raise a BecameError if the posterior's mean shall be a minimum that is computed of diagonals alone."""
        if not self.recentred and self.precision != "diagonal":
            raise BecameError(
                f"{self.name} keeps the minimum of all tasks' quadratics, which is known for diagonals alone; choose "
                "the precision 'diagonal'."
            )

    @property
    def merges_stages(self) -> bool:
        """Whether a second stage is trained without constraint and then merged with the first."""
        return self.rule is not None and self.merges == "stages"

    @property
    def stages(self) -> int:
        """How many stages a task has, 1 or 2."""
        return 2 if self.merges_stages or (self.projector is not None and self.projector.stages == 2) else 1

    @property
    def norm_penalty(self) -> float:
        """The strength of the penalty on the parameters that the projector cannot protect; 0 freezes them."""
        return 0.0 if self.projector is None else self.projector.unprotected_penalty()

    @property
    def keeps_posterior(self) -> bool:
        """Whether the method needs the Laplace posterior of the old tasks."""
        rule_needs_it = self.rule is not None and self.rule.needs_losses
        return rule_needs_it or self.penalty_strength > 0 or self.norm_penalty > 0

    def updated_posterior(self, old: LaplacePosterior | None, theta: Params, curvature: Precision) -> LaplacePosterior:
        """Return the posterior with one more task.

        Args:
            old: the posterior of the tasks before; None for the first task.
            theta: the weights after the task.
            curvature: the curvature of the task's loss at these weights.
        """
        if old is None:
            return LaplacePosterior(theta, curvature)
        if not self.recentred:
            precisions = ((old.precision * self.decay).diagonal(), curvature.diagonal())
            theta = precision_weighted_mean((old.mean, theta), precisions, (0.5, 0.5))
        return old.update(theta, curvature, decay=self.decay)
