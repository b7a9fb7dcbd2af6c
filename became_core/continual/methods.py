"""Continual-learning methods as compositions: a projector, a penalty, a merging rule.

| name | stage 1 | stage 2 and merge | source |
| --- | --- | --- | --- |
| finetune | unconstrained | - | the lower bound |
| joint | on all tasks so far | - | the upper bound |
| ewc | penalised by the Laplace posterior | - | Kirkpatrick 2017, one penalty recentred at each task (Huszar 2018) |
| gpm | under gradient projection | - | Saha 2021 |
| became | under gradient projection (GPM) | the full formula, calibrated | BECAME 2025 |
| became-paper | under gradient projection (GPM) | the closed form, as published | BECAME 2025 |
"""

from collections.abc import Callable
from dataclasses import dataclass

from became_core.curvature import FisherKind
from became_core.errors import BecameError
from became_core.laplace import Became, Calibrated, MergeRule, Published
from became_core.projection import GPM, Projector

__all__ = ["METHODS", "Method", "MethodSettings", "build_method"]


@dataclass(frozen=True)
class MethodSettings:
    """The numbers a method's parts are built with.

    Attributes:
        gpm_threshold: GPM's epsilon for the first task.
        gpm_increment: what it grows by from task to task.
        ewc_strength: EWC's lambda, beside Fisher matrices that are means over samples and add over tasks.
    """

    gpm_threshold: float = 0.97
    gpm_increment: float = 0.003
    ewc_strength: float = 100.0

    def __post_init__(self) -> None:
        """Check the numbers that no part checks by itself."""
        if self.ewc_strength < 0:
            raise BecameError(f"the EWC strength is {self.ewc_strength}; it must be at least 0.")


@dataclass(frozen=True)
class Method:
    """What is done with a new task.

    Attributes:
        name: as on the command line.
        projector: the empty memory to begin with; stage 1 is projected by it from the second task on.
        penalty_strength: of the pull towards the Laplace posterior in stage 1; none if 0.
        rule: if given, stage 2 follows, and this rule merges the two stages' weights.
        fisher: the kind of diagonal Fisher information that the posterior and the rule take.
        joint: whether earlier tasks' data are trained on as well.
    """

    name: str
    projector: Projector | None = None
    penalty_strength: float = 0.0
    rule: MergeRule | None = None
    fisher: FisherKind = "empirical"
    joint: bool = False

    @property
    def keeps_posterior(self) -> bool:
        """Whether the method needs the Laplace posterior of the old tasks."""
        return self.rule is not None or self.penalty_strength > 0


def _gpm(settings: MethodSettings) -> GPM:
    return GPM(threshold=settings.gpm_threshold, increment=settings.gpm_increment)


METHODS: dict[str, Callable[[MethodSettings], Method]] = {
    "became": lambda s: Method("became", projector=_gpm(s), rule=Became(Calibrated())),
    "became-paper": lambda s: Method("became-paper", projector=_gpm(s), rule=Became(Published()), fisher="batch"),
    "ewc": lambda s: Method("ewc", penalty_strength=s.ewc_strength),
    "finetune": lambda s: Method("finetune"),
    "gpm": lambda s: Method("gpm", projector=_gpm(s)),
    "joint": lambda s: Method("joint", joint=True),
}


def build_method(name: str, settings: MethodSettings) -> Method:
    """Return the method of that name.

    Raises:
        BecameError: if there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise BecameError(f"there is no method '{name}'; choose from {', '.join(sorted(METHODS))}.")
    return METHODS[name](settings)
