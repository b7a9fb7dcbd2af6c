"""Merging task by task: which rule merges after which task, and where a task's own model begins.

| value | the merge after task t, counted from 0 | source |
| --- | --- | --- |
| ``EqualShares`` | the mean of all t + 1 tasks' models: t / (t + 1) old + 1 / (t + 1) new | Lee 2017, mean-IMM |
| ``ByHand`` | (1 - alpha_t) old + alpha_t new, each alpha_t chosen by hand | CoMA, Marouf 2024 |
| ``Grid`` | the best of an even grid by the true loss of all tasks so far | what no continual learner can know |

IMM (Lee et al., NeurIPS 2017, arXiv 1703.08475) trains a model a task, theta_t from theta_{t-1}, and merges all of them
by equal or other shares (mean), or by their precisions (mode). One task at a time comes to the same: the mean and the
precision-weighted mean of t + 1 models are those of the first t models' and the last, with t shares for one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from became_core.arrays import Params, namespace
from became_core.continual.learner import Penalty
from became_core.errors import BecameError
from became_core.laplace import Diagonal, Fixed, GridSearch, LaplacePosterior, MeanIMM, MergeRule

__all__ = ["ByHand", "EqualShares", "Grid", "Increments", "Transfer"]

TrueLoss = Callable[[Params], float]


@dataclass(frozen=True)
class EqualShares:
    """Every task's model counts alike in the end."""

    def rule(self, task: int, loss: TrueLoss) -> MergeRule:
        """Return the rule of the merge after a task, the first being 0."""
        return MeanIMM((float(task), 1.0))


@dataclass(frozen=True)
class ByHand:
    """Coefficients chosen by hand.

    Attributes:
        alphas: the new model's coefficient at the first merge, at the second, …; the last one stays.

    Raises:
        BecameError: if there is none, or one is not in [0, 1].
    """

    alphas: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the coefficients."""
        if not self.alphas:
            raise BecameError("there is no merging coefficient; give at least one alpha.")
        for alpha in self.alphas:
            Fixed(alpha)

    def rule(self, task: int, loss: TrueLoss) -> MergeRule:
        """Return the rule of the merge after a task, the first being 0."""
        return Fixed(self.alphas[min(task, len(self.alphas)) - 1])


@dataclass(frozen=True)
class Grid:
    """The truth on a grid: it looks at the data of all tasks, and is here to hold the others against."""

    points: int = 21

    def rule(self, task: int, loss: TrueLoss) -> MergeRule:
        """Return the rule of the merge after a task.

        Args:
            task: its index.
            loss: the true loss of all tasks so far.
        """
        return GridSearch(loss, self.points)


# What names a rule anew for every task.
Increments = EqualShares | ByHand | Grid


@dataclass(frozen=True)
class Transfer:
    """How a task's own model depends on the one before it, in methods that merge the models afterwards (Lee 2017).

    Attributes:
        weights: weight-transfer: training begins at the model of the task before, unmerged; else at the initial one.
        pull: L2-transfer: the strength of a quadratic pull, pull/2 |theta - theta_{t-1}|^2, while training.
    """

    weights: bool = True
    pull: float = 0.0

    def __post_init__(self) -> None:
        """Check the strength."""
        if self.pull < 0:
            raise BecameError(f"the strength of L2-transfer is {self.pull}; it must be at least 0.")

    def kept(self, models: Mapping[str, Params], before: Params, after: Params) -> dict[str, Params]:
        """Return what is kept of models, "initial" and "previous", one task on; only what is needed.

        Args:
            models: what was kept before the task; empty before the first.
            before: the weights that the task began with.
            after: the task's own model, unmerged.
        """
        initial = {} if self.weights else {"initial": models.get("initial", before)}
        return initial | ({"previous": after} if self.weights or self.pull else {})

    def start(self, models: Mapping[str, Params], merged: Params, heads: frozenset[str]) -> Params:
        """Return what training begins with: the heads of the merged model, and all else from a kept one."""
        kept = models["previous" if self.weights else "initial"]
        return {name: value if name in heads else kept[name] for name, value in merged.items()}

    def penalty(self, models: Mapping[str, Params], heads: frozenset[str]) -> Penalty | None:
        """Return the pull of all but heads to the model of the task before, if there is one."""
        if not self.pull:
            return None
        mean = models["previous"]
        stiffness = {}
        for name, value in mean.items():
            xp = namespace(mean=value)
            stiffness[name] = xp.zeros_like(value) if name in heads else xp.ones_like(value)
        return Penalty(LaplacePosterior(mean, Diagonal(stiffness)), self.pull)
