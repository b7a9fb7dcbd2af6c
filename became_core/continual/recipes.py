"""The recipes that continual-learning methods are built from, by name; ``building`` makes a ``Method`` of a name.

| name | stage 1 | stage 2 and merge | source |
| --- | --- | --- | --- |
| finetune | unconstrained | - | the lower bound |
| joint | on all tasks so far | - | the upper bound |
| ewc | penalised by every old task's own quadratic, added | - | Kirkpatrick 2017 |
| ewc-online | penalised by one quadratic, recentred at each task, decaying | - | Huszar 2018; Schwarz 2018 |
| gpm, sgp, gpcns, nscl, ogd, trgp | under that gradient projection | - | ``became_core.projection`` |
| inflora, olora | low-rank adapters, in spaces that old tasks leave free | - | ``became_core.projection`` |
| packnet | in the free weights | retrained after pruning, the pruned at zero; no merge | Mallya 2018 |
| hat | gates of units, learned with the weights between units that no task uses | - | Serra 2018 |
| imm-mean, imm-mode | unconstrained, or L2-transfer | the tasks' models, by equal shares or precisions | Lee 2017 |
| coma | unconstrained | the old model and the new, alpha chosen by hand | Marouf 2024 |
| became | under gradient projection (GPM) | the full formula: true slopes, the old side calibrated | BECAME 2025 |
| became-paper | under gradient projection (GPM) | the closed form, as published | BECAME 2025 |
| became-curve | under gradient projection (GPM) | the same formula along a curve towards the diagonals' mode | |
| became-0, became-half, became-1 | under gradient projection (GPM) | alpha = 0, 1/2, 1 | ablations |
| became-grid | under gradient projection (GPM) | the best alpha by the true loss of all tasks | a bound |

The two forms of EWC differ only in the mean of their quadratic. A sum of quadratics is one quadratic about its minimum,
which is the precision-weighted mean of the tasks' weights; the recentred form is about the latest weights. Both include
the importance of old heads. It has no effect, because a later task's loss has no gradient there.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from became_core.continual.methods import Method, Transfer
from became_core.continual.task_rules import ChosenAlphas, EqualShares, TrueLossGrid
from became_core.continual.tempering import Tempering
from became_core.curvature import FisherTargets
from became_core.errors import BecameError
from became_core.laplace import (
    Became,
    BecameCurve,
    DiagonalFisher,
    Estimator,
    Fixed,
    MergeRule,
    ModeIMM,
    NativeExpansion,
    PaperClosedForm,
    Secant,
)
from became_core.laplace.rules import PerWeight
from became_core.registry import Registry, setting

__all__ = [
    "METHODS",
    "MethodRecipe",
]

Curvature = Literal["diagonal", "kronecker", "exact", "across"]
ESTIMATORS: Mapping[Curvature, Estimator] = {
    "exact": Secant(),
    "across": Secant(calibrates=False),
    "diagonal": DiagonalFisher(),
    "kronecker": NativeExpansion(),
}


class MethodRecipe(ABC):
    """Builds a method from settings. It is a frozen dataclass; a user may choose its fields made by ``setting``."""

    projector: ClassVar[str] = "none"
    """The name of the method's projector if no other is chosen."""

    alone: ClassVar[str] = ""
    """Why the method takes no projector; empty if it takes any."""

    @property
    def contradiction(self) -> str:
        """Why the settings cannot be used together, though each of them can be; empty if they can."""
        return ""

    @abstractmethod
    def build(self) -> Method:
        """Return the method without its projector; ``build_method`` adds that, and the full name."""


@dataclass(frozen=True)
class _WithDecay(MethodRecipe):
    """A method whose posterior forgets old tasks gradually.

    Attributes:
        decay: gamma, the factor by which the old tasks' curvature is multiplied at each new task; in [0, 1].
    """

    decay: float = setting(1.0)

    def __post_init__(self) -> None:
        """Check the decay."""
        if not 0 <= self.decay <= 1:
            raise BecameError(f"the decay of old curvature is {self.decay}; it must be in [0, 1].")


@dataclass(frozen=True)
class _Tempered(_WithDecay):
    """A method whose merge weighs two stages by curvature.

    Attributes:
        temper: how held-out samples correct the curvature that a task has in the posterior. none: not at all.
            curvature: it is multiplied by the curvature of held-out samples along the path of the merge, divided by
            that of training samples. rise: likewise, with the rise of the loss along the path in place of curvature.
            calibrated: losses are measured with the softmax temperature that fits the held-out samples best.
    """

    temper: Tempering = setting("none")


@dataclass(frozen=True)
class _ByCurvature(_Tempered):
    """A method whose merge weighs two stages by curvature of a chosen form.

    Attributes:
        fisher: the labels that the Fisher information is computed with. empirical: those given. true: all labels, each
            weighted by its predicted probability, which takes a backward pass for each label. sampled: one label for
            each sample, drawn from the predicted probabilities.
        precision: the curvatures that the merge is computed from. diagonal and kronecker: those of both sides, in this
            form. exact and across: the exact curvature of the new task along the path, and the diagonal of the old
            tasks, multiplied by what a diagonal misses. exact measures this factor at each merge, of the new task.
            across measures it once for each old task, when it is remembered, and is meant for long training.
    """

    fisher: FisherTargets = setting("empirical")
    precision: Curvature = setting("exact")

    def method(self, name: str, rule: MergeRule) -> Method:
        """Return a method with a rule; if it merges by Kronecker factors, its posterior has them as well."""
        return Method(
            name,
            rule=rule,
            fisher=self.fisher,
            precision="kronecker" if self.precision == "kronecker" else "diagonal",
            decay=self.decay,
            calibrates=self.precision == "across",
            temper=self.temper,
        )

    def unlike_diagonals(self, what: str) -> str:
        """Return why something cannot compare both sides' diagonals; empty if the two have one unit."""
        if self.precision != "across":
            return ""
        return (
            f"{what} compares the diagonals of both sides, and --precision across, which some presets have, calibrates "
            "that of the old side alone; give --precision exact"
        )


@dataclass(frozen=True)
class BecameRecipe(_ByCurvature):
    """Gradient projection, then free training, merged at alpha* of the full formula (BECAME 2025).

    Attributes:
        per: which parameters share a merging coefficient. model: all. layer and leaf: those of a layer, or of one
            array. weight: none; each weight has a coefficient of its own, computed from the diagonals of both sides.
        shrinkage: with a coefficient for each weight, how far the result is moved back towards the merge with one
            coefficient for the whole model: 0 for not at all, 1 for all the way.
    """

    per: PerWeight = setting("model")
    shrinkage: float = setting(0.0)

    projector: ClassVar[str] = "gpm"

    @property
    def contradiction(self) -> str:
        """Why the settings cannot be used together; a coefficient per weight is a ratio of two diagonals."""
        return self.unlike_diagonals("--per weight") if self.per == "weight" else ""

    def build(self) -> Method:
        """Return the method."""
        return self.method("became", Became(ESTIMATORS[self.precision], self.per, shrinkage=self.shrinkage))


@dataclass(frozen=True)
class CurveRecipe(_ByCurvature):
    """As became, merged along a curve that bends towards the mode of both sides' diagonals."""

    projector: ClassVar[str] = "gpm"

    @property
    def contradiction(self) -> str:
        """Why the settings cannot be used together; the mode of two diagonals is their ratio."""
        return self.unlike_diagonals("the curve")

    def build(self) -> Method:
        """Return the method."""
        return self.method("became-curve", BecameCurve(ESTIMATORS[self.precision]))


@dataclass(frozen=True)
class PaperRecipe(_Tempered):
    """Gradient projection, then free training, merged at alpha* as published: two diagonals (BECAME 2025)."""

    projector: ClassVar[str] = "gpm"

    def build(self) -> Method:
        """Return the method, which uses the published code's estimate of the Fisher information."""
        rule = Became(PaperClosedForm())
        return Method("became-paper", rule=rule, fisher="batch", decay=self.decay, temper=self.temper)


@dataclass(frozen=True)
class StableRecipe(MethodRecipe):
    """As became, merged at alpha = 0, which keeps stage 1's model (ablation)."""

    alpha: ClassVar[float] = 0.0
    projector: ClassVar[str] = "gpm"

    def build(self) -> Method:
        """Return the method."""
        return Method("became-0", rule=Fixed(self.alpha))


@dataclass(frozen=True)
class HalfRecipe(StableRecipe):
    """As became, merged at alpha = 1/2 (ablation)."""

    alpha: ClassVar[float] = 0.5


@dataclass(frozen=True)
class PlasticRecipe(StableRecipe):
    """As became, merged at alpha = 1, which keeps stage 2's model (ablation)."""

    alpha: ClassVar[float] = 1.0


@dataclass(frozen=True)
class GridRecipe(MethodRecipe):
    """As became, merged at the best alpha of a grid by the true loss of all tasks (a bound).

    Attributes:
        points: how many coefficients the grid has, with both ends.
    """

    points: int = setting(21, option="grid_points")

    projector: ClassVar[str] = "gpm"

    def build(self) -> Method:
        """Return the method."""
        return Method("became-grid", rule=TrueLossGrid(self.points))


@dataclass(frozen=True)
class CoMARecipe(MethodRecipe):
    """Plain training, merged with the model before at an alpha chosen by hand (Marouf 2024).

    Attributes:
        alphas: the new model's coefficient at each merge; the last one is used for all later merges.
    """

    alphas: tuple[float, ...] = setting((0.5,), option="coma_alpha")

    def build(self) -> Method:
        """Return the method."""
        return Method("coma", rule=ChosenAlphas(self.alphas), merges="tasks")


@dataclass(frozen=True)
class _IMM(MethodRecipe):
    """Incremental moment matching.

    Attributes:
        transfer: whether a task's training begins with the model of the task before; if not, it begins with the initial
            weights.
        pull: the strength of the penalty on leaving the model of the task before (L2-transfer); none if 0.
    """

    transfer: bool = setting(True, option="imm_transfer")
    pull: float = setting(0.0, option="imm_pull")


@dataclass(frozen=True)
class MeanIMMRecipe(_IMM):
    """Plain training, and the mean of all tasks' models (Lee 2017)."""

    def build(self) -> Method:
        """Return the method."""
        return Method("imm-mean", rule=EqualShares(), merges="tasks", transfer=Transfer(self.transfer, self.pull))


@dataclass(frozen=True)
class ModeIMMRecipe(_IMM):
    """Plain training, and all tasks' models weighed by their precisions (Lee 2017)."""

    def build(self) -> Method:
        """Return the method."""
        return Method("imm-mode", rule=ModeIMM(), merges="tasks", transfer=Transfer(self.transfer, self.pull))


@dataclass(frozen=True)
class EWCRecipe(MethodRecipe):
    """Penalised by every old task's own quadratic, added (Kirkpatrick 2017).

    Attributes:
        strength: lambda, the strength of the penalty, whose Fisher matrices are means over samples of squared gradients
            of single samples, and sums over tasks; at least 0. Codes that square the gradients of batches have another
            unit.
    """

    strength: float = setting(100.0, option="ewc_strength")

    def __post_init__(self) -> None:
        """Check the strength."""
        if not self.strength >= 0:
            raise BecameError(f"the EWC strength is {self.strength}; it must be at least 0.")

    def build(self) -> Method:
        """Return the method."""
        return Method("ewc", penalty_strength=self.strength, recentred=False)


@dataclass(frozen=True)
class OnlineEWCRecipe(_WithDecay, EWCRecipe):
    """Penalised by one quadratic, recentred at each task, which decays (Huszar 2018; Schwarz 2018)."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        _WithDecay.__post_init__(self)
        EWCRecipe.__post_init__(self)

    def build(self) -> Method:
        """Return the method."""
        return Method("ewc-online", penalty_strength=self.strength, decay=self.decay)


@dataclass(frozen=True)
class FinetuneRecipe(MethodRecipe):
    """Unconstrained training on the new task alone (the lower bound)."""

    def build(self) -> Method:
        """Return the method."""
        return Method("finetune")


@dataclass(frozen=True)
class JointRecipe(MethodRecipe):
    """Training on all tasks so far (the upper bound)."""

    alone: ClassVar[str] = "joint training sees all tasks and has nothing to protect"

    def build(self) -> Method:
        """Return the method."""
        return Method("joint", joint=True)


METHODS: Registry[MethodRecipe] = Registry(
    "became.methods",
    "method",
    {
        "became": BecameRecipe,
        "became-paper": PaperRecipe,
        "became-curve": CurveRecipe,
        "became-0": StableRecipe,
        "became-half": HalfRecipe,
        "became-1": PlasticRecipe,
        "became-grid": GridRecipe,
        "imm-mean": MeanIMMRecipe,
        "imm-mode": ModeIMMRecipe,
        "coma": CoMARecipe,
        "ewc": EWCRecipe,
        "ewc-online": OnlineEWCRecipe,
        "finetune": FinetuneRecipe,
        "joint": JointRecipe,
    },
)
