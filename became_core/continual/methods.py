"""Continual-learning methods as compositions: a projector, a penalty, a merging rule.

| name | stage 1 | stage 2 and merge | source |
| --- | --- | --- | --- |
| finetune | unconstrained | - | the lower bound |
| joint | on all tasks so far | - | the upper bound |
| ewc | penalised by the Laplace posterior | - | Kirkpatrick 2017, one penalty recentred at each task (Huszar 2018) |
| gpm, sgp, gpcns, nscl, ogd, trgp | under that gradient projection | - | ``became_core.projection`` |
| became | under gradient projection (GPM) | the full formula: true slopes, the old side calibrated | BECAME 2025 |
| became-paper | under gradient projection (GPM) | the closed form, as published | BECAME 2025 |

Any of them but ``joint`` takes any projector in place of its own: ``became+trgp``, ``ewc+gpm``, ``became+none``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from became_core.curvature import FisherKind
from became_core.errors import BecameError
from became_core.laplace import Became, MergeRule, Published, Secant
from became_core.projection import GPCNS, GPM, NSCL, OGD, SGP, TRGP, Projector

__all__ = ["METHODS", "PROJECTORS", "Method", "MethodSettings", "build_method"]


@dataclass(frozen=True)
class MethodSettings:
    """The numbers a method's parts are built with.

    Attributes:
        threshold: epsilon of GPM, SGP, GPCNS and TRGP for the first task.
        increment: what it grows by from task to task.
        scale: SGP's and GPCNS's s.
        nscl_ratio: NSCL's a, how far above the smallest eigenvalue still counts as null.
        ogd_samples: a task's samples whose gradients OGD keeps.
        ogd_capacity: how many directions OGD keeps in all.
        ewc_strength: EWC's lambda, beside Fisher matrices that are means over samples and add over tasks.
    """

    threshold: float = 0.97
    increment: float = 0.003
    scale: float = 5.0
    nscl_ratio: float = 10.0
    ogd_samples: int = 200
    ogd_capacity: int = 200
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


PROJECTORS: dict[str, Callable[[MethodSettings], Projector | None]] = {
    "none": lambda s: None,
    "gpm": lambda s: GPM(s.threshold, s.increment),
    "sgp": lambda s: SGP(s.threshold, s.increment, scale=s.scale),
    "gpcns": lambda s: GPCNS(s.threshold, s.increment, scale=s.scale),
    "nscl": lambda s: NSCL(s.nscl_ratio),
    "ogd": lambda s: OGD(s.ogd_samples, s.ogd_capacity),
    "trgp": lambda s: TRGP(s.threshold, s.increment),
}

# Without their projector, which ``build_method`` adds: the one asked for, or that of ``_PROJECTED_BY``.
_METHODS: dict[str, Callable[[MethodSettings], Method]] = {
    "became": lambda s: Method("became", rule=Became(Secant())),
    "became-paper": lambda s: Method("became-paper", rule=Became(Published()), fisher="batch"),
    "ewc": lambda s: Method("ewc", penalty_strength=s.ewc_strength),
    "finetune": lambda s: Method("finetune"),
    "joint": lambda s: Method("joint", joint=True),
    **{name: lambda s, name=name: Method(name) for name in PROJECTORS if name != "none"},  # type: ignore[misc]
}

_PROJECTED_BY = {"became": "gpm", "became-paper": "gpm"} | {name: name for name in PROJECTORS}

# The names of all methods.
METHODS = tuple(sorted(_METHODS))


def build_method(name: str, settings: MethodSettings) -> Method:
    """Return the method of that name, ``METHOD`` or ``METHOD+PROJECTOR``.

    Raises:
        BecameError: if there is no such method or projector, the message listing those there are, or a number that
            its parts are built with cannot be used.
    """
    base, plus, projector = name.partition("+")
    if base not in _METHODS:
        raise BecameError(f"there is no method '{base}'; choose from {', '.join(METHODS)}.")
    projector = projector if plus else _PROJECTED_BY.get(base, "none")
    if projector not in PROJECTORS:
        raise BecameError(f"there is no projector '{projector}'; choose from {', '.join(PROJECTORS)}.")
    if base == "joint" and projector != "none":
        raise BecameError(f"'{name}': joint training sees all tasks and has nothing to protect; it takes no projector.")
    return replace(_METHODS[base](settings), name=name, projector=PROJECTORS[projector](settings))
