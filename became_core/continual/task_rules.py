"""Merging rules that differ from one merge of a continual run to the next: ``for_task`` names the one for a task.

| rule | the merge after task t, counted from 0 | source |
| --- | --- | --- |
| ``EqualShares`` | the mean of all t + 1 tasks' models: t / (t + 1) old + 1 / (t + 1) new | Lee 2017, mean-based IMM |
| ``ChosenAlphas`` | (1 - alpha_t) old + alpha_t new, each alpha_t chosen by hand | CoMA, Marouf 2024 |
| ``TrueLossGrid`` | the best of an even grid by the true loss of all tasks so far | a bound |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from became_core.arrays import Params
from became_core.errors import BecameError
from became_core.laplace import Fixed, GridSearch, LocalLoss, MeanIMM, Merged, MergeRule
from became_core.laplace.rules import TrueLoss

__all__ = ["ChosenAlphas", "EqualShares", "TrueLossGrid"]


@dataclass(frozen=True)
class EqualShares(MergeRule):
    """Every task's model counts alike in the end: mean-based IMM, one task at a time.

    Lee et al. (NeurIPS 2017, arXiv 1703.08475) merge all tasks' models at once. One task at a time comes to the same:
    the mean of t + 1 models is that of the first t models' mean, with t shares, and of the last model, with one.
    """

    needs_losses: ClassVar[bool] = False

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return the mean, as after the first merge."""
        return MeanIMM().merge(models, losses)

    def for_task(self, task: int, true_loss: TrueLoss) -> MergeRule:
        """Return the mean with t shares for the old model and one for the new."""
        return MeanIMM((float(task), 1.0))


@dataclass(frozen=True)
class ChosenAlphas(MergeRule):
    """Coefficients chosen by hand, one for each merge.

    Attributes:
        alphas: the new model's coefficient at the first merge, at the second, and so on; the last one stays.

    Raises:
        BecameError: if there is none, or one is not in [0, 1].
    """

    alphas: tuple[float, ...]

    needs_losses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the coefficients."""
        if not self.alphas:
            raise BecameError("there is no merging coefficient; give at least one alpha.")
        for alpha in self.alphas:
            Fixed(alpha)

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Merge at the first coefficient."""
        return Fixed(self.alphas[0]).merge(models, losses)

    def for_task(self, task: int, true_loss: TrueLoss) -> MergeRule:
        """Return the rule with the coefficient of the merge after a task."""
        return Fixed(self.alphas[min(task, len(self.alphas)) - 1])


@dataclass(frozen=True)
class TrueLossGrid(MergeRule):
    """The best of an even grid by the true loss of all tasks so far: a bound to compare other rules with.

    Attributes:
        points: how many, both ends among them.

    Raises:
        BecameError: if there are fewer than two.
    """

    points: int = 21

    needs_losses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the number of points."""
        if self.points < 2:
            raise BecameError(f"a grid of {self.points} points has no ends; give at least 2.")

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Refuse to merge: the true loss is known to ``for_task`` alone."""
        raise BecameError("a grid by the true loss needs that loss; call for_task, or use GridSearch.")

    def for_task(self, task: int, true_loss: TrueLoss) -> MergeRule:
        """Return a grid search by the true loss."""
        return GridSearch(true_loss, self.points)
