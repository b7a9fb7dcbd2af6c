"""Continual-learning methods as compositions: a projector, a penalty, a merging rule.

| name | stage 1 | stage 2 and merge | source |
| --- | --- | --- | --- |
| finetune | unconstrained | - | the lower bound |
| joint | on all tasks so far | - | the upper bound |
| ewc | penalised by every old task's own quadratic, added | - | Kirkpatrick 2017 |
| ewc-online | penalised by one quadratic, recentred at each task, decaying | - | Huszar 2018; Schwarz 2018 |
| gpm, sgp, gpcns, nscl, ogd, trgp | under that gradient projection | - | ``became_core.projection`` |
| packnet | in the free weights | retrained after pruning, the pruned at zero; no merge | Mallya 2018 |
| hat | gates of units, learned with the weights between units that no task uses | - | Serra 2018 |
| imm-mean, imm-mode | unconstrained, or L2-transfer | the tasks' models, by equal shares or precisions | Lee 2017 |
| coma | unconstrained | the old model and the new, alpha chosen by hand | Marouf 2024 |
| became | under gradient projection (GPM) | the full formula: true slopes, the old side calibrated | BECAME 2025 |
| became-paper | under gradient projection (GPM) | the closed form, as published | BECAME 2025 |
| became-0, became-half, became-1 | under gradient projection (GPM) | alpha = 0, 1/2, 1 | ablations |
| became-grid | under gradient projection (GPM) | the best alpha by the true loss of all tasks | a bound |

Any of them but ``joint``, ``packnet`` and ``hat`` takes any projector in place of its own: ``became+trgp``,
``ewc+gpm``, ``became+none``.

The two forms of EWC differ in the mean alone: a sum of quadratics is one quadratic, about its own minimum, the
precision-weighted mean of the tasks' weights, where the recentred form is about the latest weights. In either, the
importance of an old head is among the rest, and acts on nothing: no gradient of a later task's loss reaches it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from became_core.arrays import Params
from became_core.continual.increments import ByHand, EqualShares, Grid, Increments, Transfer, TrueLoss
from became_core.continual.measurement import Structure
from became_core.curvature import FisherKind
from became_core.errors import BecameError
from became_core.laplace import (
    Became,
    DiagonalFisher,
    Estimator,
    Fixed,
    LaplacePosterior,
    MergeRule,
    ModeIMM,
    NativeExpansion,
    PaperClosedForm,
    Precision,
    Secant,
)
from became_core.laplace.expansion import Per
from became_core.laplace.rules import precision_weighted_mean
from became_core.projection import GPCNS, GPM, HAT, NSCL, OGD, SGP, TRGP, PackNet, Projector

__all__ = ["METHODS", "PROJECTORS", "Method", "MethodSettings", "build_method"]

# What the curvature along the path is taken from. "exact" is so of the new task alone, whose data are at hand; the old
# tasks' is then a diagonal, calibrated by the ratio of the two for the new task. Else both sides have one structure.
Curvature = Literal["diagonal", "kronecker", "exact"]


@dataclass(frozen=True)
class MethodSettings:
    """The numbers a method's parts are built with.

    Attributes:
        threshold: epsilon of GPM, SGP, GPCNS and TRGP for the first task.
        increment: what it grows by from task to task.
        scale: SGP's and GPCNS's s.
        nscl_ratio: NSCL's a, how far above the smallest eigenvalue still counts as null.
        norm_penalty: the strength of a quadratic pull, strength/2, on what a projector of matrices cannot protect,
            normalisation and biases, beside Fisher matrices as of EWC; if 0, these are frozen after the first task.
        ogd_samples: a task's samples whose gradients OGD keeps.
        ogd_capacity: how many directions OGD keeps in all.
        ewc_strength: EWC's lambda, beside Fisher matrices that are means over samples and add over tasks.
        decay: the posterior's gamma in ``became``, ``became-paper`` and online EWC, by which a task's curvature is
            multiplied at each later one; in [0, 1].
        imm_transfer: whether a task's own model begins at the one before (weight-transfer) or at the initial weights.
        imm_pull: the strength of IMM's L2-transfer.
        coma_alpha: CoMA's coefficients, one a merge; the last one stays.
        grid_points: of the grid that ``became-grid`` looks at.
        packnet_share: p, of a layer's free weights, that PackNet prunes at each task.
        hat_sharpness: s_max of HAT's gates.
        hat_sparsity: c, what the capacity that a task takes costs it, beside a mean loss.
        per: what shares a coefficient in ``became``.
        precision: the curvatures that ``became`` merges by.
    """

    threshold: float = 0.97
    increment: float = 0.003
    scale: float = 5.0
    nscl_ratio: float = 10.0
    norm_penalty: float = 0.0
    ogd_samples: int = 200
    ogd_capacity: int = 200
    ewc_strength: float = 100.0
    decay: float = 1.0
    imm_transfer: bool = True
    imm_pull: float = 0.0
    coma_alpha: tuple[float, ...] = (0.5,)
    grid_points: int = 21
    packnet_share: float = 0.5
    hat_sharpness: float = 400.0
    hat_sparsity: float = 0.75
    per: Per = "model"
    precision: Curvature = "exact"

    def __post_init__(self) -> None:
        """Check the numbers that no part checks by itself."""
        if self.ewc_strength < 0:
            raise BecameError(f"the EWC strength is {self.ewc_strength}; it must be at least 0.")
        if self.norm_penalty < 0:
            raise BecameError(f"the penalty on normalisation is {self.norm_penalty}; it must be at least 0.")
        if not 0 <= self.decay <= 1:
            raise BecameError(f"the decay of old curvature is {self.decay}; it must be in [0, 1].")
        if self.grid_points < 2:
            raise BecameError(f"a grid of {self.grid_points} points has no ends; give at least 2.")


@dataclass(frozen=True)
class Method:
    """What is done with a new task.

    Attributes:
        name: as on the command line.
        projector: the empty memory to begin with; stage 1 is projected by it from the second task on.
        penalty_strength: of the pull towards the Laplace posterior in stage 1; none if 0.
        norm_penalty: likewise, of what the projector cannot protect, which is frozen if 0.
        rule: if given, the rule that merges, or what names one for every task.
        merges: what it merges: the weights of "stages" 1 and 2, or, of "tasks", the old model and stage 1's.
        transfer: if given, what a task's own model begins with and is pulled to; else it begins with the merged one.
        fisher: the kind of diagonal Fisher information that the posterior and the rule take.
        precision: the structure of the curvature that the posterior keeps.
        decay: what old curvature is multiplied by at each task.
        recentred: whether the posterior is about the latest weights; else about the minimum of all tasks' quadratics.
        joint: whether earlier tasks' data are trained on as well.
    """

    name: str
    projector: Projector | None = None
    penalty_strength: float = 0.0
    norm_penalty: float = 0.0
    rule: MergeRule | Increments | None = None
    merges: Literal["stages", "tasks"] = "stages"
    transfer: Transfer | None = None
    fisher: FisherKind = "empirical"
    precision: Structure = "diagonal"
    decay: float = 1.0
    recentred: bool = True
    joint: bool = False

    @property
    def stages(self) -> int:
        """How many stages a task has."""
        merges = self.rule is not None and self.merges == "stages"
        return 2 if merges or isinstance(self.projector, PackNet) else 1

    @property
    def keeps_posterior(self) -> bool:
        """Whether the method needs the Laplace posterior of the old tasks."""
        return isinstance(self.rule, Became | ModeIMM) or self.penalty_strength > 0 or self.norm_penalty > 0

    def rule_after(self, task: int, loss: TrueLoss) -> MergeRule | None:
        """Return the rule of the merge after a task.

        Args:
            task: its index.
            loss: the true loss of all tasks so far, at which a bound may look.
        """
        return self.rule.rule(task, loss) if isinstance(self.rule, Increments) else self.rule

    def remembered(self, old: LaplacePosterior | None, theta: Params, curvature: Precision) -> LaplacePosterior:
        """Return the posterior with one more task, learned to these weights with this curvature there."""
        if old is None:
            return LaplacePosterior(theta, curvature)
        if not self.recentred:
            precisions = (old.precision.diagonal(), curvature.diagonal())
            theta = precision_weighted_mean((old.mean, theta), precisions, (0.5, 0.5))
        return old.update(theta, curvature, decay=self.decay)


PROJECTORS: dict[str, Callable[[MethodSettings], Projector | None]] = {
    "none": lambda s: None,
    "gpm": lambda s: GPM(s.threshold, s.increment),
    "sgp": lambda s: SGP(s.threshold, s.increment, scale=s.scale),
    "gpcns": lambda s: GPCNS(s.threshold, s.increment, scale=s.scale),
    "nscl": lambda s: NSCL(s.nscl_ratio),
    "ogd": lambda s: OGD(s.ogd_samples, s.ogd_capacity),
    "trgp": lambda s: TRGP(s.threshold, s.increment),
}

_ESTIMATORS: dict[Curvature, Estimator] = {
    "exact": Secant(),
    "diagonal": DiagonalFisher(),
    "kronecker": NativeExpansion(),
}


def _became(s: MethodSettings) -> Method:
    structure: Structure = "kronecker" if s.precision == "kronecker" else "diagonal"
    return Method("became", rule=Became(_ESTIMATORS[s.precision], s.per), precision=structure, decay=s.decay)


def _imm(name: str, rule: MergeRule | Increments, s: MethodSettings) -> Method:
    return Method(name, rule=rule, merges="tasks", transfer=Transfer(s.imm_transfer, s.imm_pull))


# Without their projector, which ``build_method`` adds: the one asked for, or that of ``_PROJECTED_BY``.
_METHODS: dict[str, Callable[[MethodSettings], Method]] = {
    "became": _became,
    "became-paper": lambda s: Method("became-paper", rule=Became(PaperClosedForm()), fisher="batch", decay=s.decay),
    "became-0": lambda s: Method("became-0", rule=Fixed(0.0)),
    "became-half": lambda s: Method("became-half", rule=Fixed(0.5)),
    "became-1": lambda s: Method("became-1", rule=Fixed(1.0)),
    "became-grid": lambda s: Method("became-grid", rule=Grid(s.grid_points)),
    "coma": lambda s: Method("coma", rule=ByHand(s.coma_alpha), merges="tasks"),
    "ewc": lambda s: Method("ewc", penalty_strength=s.ewc_strength, recentred=False),
    "ewc-online": lambda s: Method("ewc-online", penalty_strength=s.ewc_strength, decay=s.decay),
    "finetune": lambda s: Method("finetune"),
    "imm-mean": lambda s: _imm("imm-mean", EqualShares(), s),
    "imm-mode": lambda s: _imm("imm-mode", ModeIMM(), s),
    "hat": lambda s: Method("hat", projector=HAT(s.hat_sharpness, s.hat_sparsity)),
    "packnet": lambda s: Method("packnet", projector=PackNet(s.packnet_share)),
    "joint": lambda s: Method("joint", joint=True),
    # By itself a projector keeps a posterior for its ``norm_penalty`` alone: Wang 2021's sum of every task's quadratic.
    **{
        name: lambda s, name=name: Method(name, fisher="batch", recentred=False)  # type: ignore[misc]
        for name in PROJECTORS
        if name != "none"
    },
}

_PROJECTED_BY = {name: "gpm" for name in _METHODS if name.startswith("became")} | {name: name for name in PROJECTORS}

# Methods that take no projector, and why.
_ALONE = {
    "joint": "joint training sees all tasks and has nothing to protect",
    "hat": "gates protect every unit that is in use",
    "packnet": "masks protect every weight that is in use",
}

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
    if plus and base in _ALONE:
        raise BecameError(f"'{name}': {_ALONE[base]}; it takes no projector.")
    method = replace(_METHODS[base](settings), name=name)
    if base in _ALONE:
        return method
    found = PROJECTORS[projector](settings)
    penalised = found is not None and not found.protects_all
    return replace(method, projector=found, norm_penalty=settings.norm_penalty if penalised else 0.0)
