"""Whole runs with the reference learner: the contents of the record, and the effect of each mechanism."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from became_core import BecameError
from became_core.arrays import Params
from became_core.continual import (
    Annealed,
    EpochEnd,
    Method,
    Patience,
    RunRecord,
    TaskEnd,
    Training,
    build_method,
    learn,
    method_names,
    metrics,
)
from became_core.continual.evaluation import accuracies, mean_loss
from became_core.laplace import (
    Became,
    DiagonalFisher,
    FisherMerge,
    LocalLoss,
    Merged,
    MergeRule,
    ModeIMM,
    merge,
)
from became_core.projection import GPM, Region, TaskStart
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream(validation=0.1)
TRAINING = Training(Annealed(0.2, 6), Annealed(0.2, 3), batch_size=16)
SETTINGS = {"threshold": 0.97, "ewc_strength": 2.0}
Observe = Callable[[EpochEnd | TaskEnd], None]


def run(
    name: str,
    *,
    seed: int = 0,
    training: Training = TRAINING,
    settings: Mapping[str, Any] = SETTINGS,
    learner: ReferenceLearner | None = None,
    observe: Observe = lambda event: None,
) -> RunRecord:
    learner = ReferenceLearner(STREAM, seed=seed, bias=True) if learner is None else learner
    looking = [Listening(observe)]
    return learn(learner, STREAM, build_method(name, settings), training, seed=seed, callbacks=looking)


def facts(record: RunRecord) -> dict[str, str]:
    """Return a record without its seconds, as texts, so that two NaN are equal."""
    return {name: repr(value) for name, value in vars(record).items() if name != "seconds"}


@pytest.mark.parametrize("name", sorted(method_names()))
def test_the_shapes_of_a_record(name: str) -> None:
    ended: list[TaskEnd] = []
    record = run(name, observe=lambda event: ended.append(event) if isinstance(event, TaskEnd) else None)
    lower = np.tri(3, dtype=bool)
    for matrix in (record.accuracy, record.class_incremental_accuracy):
        assert matrix.shape == (3, 3)
        np.testing.assert_array_equal(np.isnan(matrix), ~lower)
        assert np.all((matrix[lower] >= 0) & (matrix[lower] <= 100))
    assert np.all(record.class_incremental_accuracy[lower] <= record.accuracy[lower])
    assert [end.task for end in ended] == [0, 1, 2]
    assert [len(end.accuracy) for end in ended] == [1, 2, 3]
    assert [end.alpha for end in ended] == record.alpha
    np.testing.assert_array_equal(ended[-1].accuracy, record.accuracy[-1])
    method = build_method(name, SETTINGS)
    merges = method.rule is not None
    assert record.alpha[0] is None
    on_a_segment = merges and name != "imm-mode"
    assert all(alpha is not None and 0 <= alpha <= 1 if on_a_segment else alpha is None for alpha in record.alpha[1:])
    assert record.epochs == ([9, 9, 9] if method.stages == 2 else [6, 6, 6])
    assert record.paths == []
    weights = {"fc1.weight", "fc2.weight"} if method.projector is not None else set()
    assert [set(ranks) for ranks in record.ranks] == [{"shared parameters"} if name == "ogd" else weights] * 3
    phases = {"stage1", "memory", "evaluation", "total"} | ({"merge"} if merges else set())
    phases |= {"stage2"} if method.stages == 2 else set()
    assert set(record.seconds) == phases
    assert all(seconds >= 0 for seconds in record.seconds.values())


@pytest.mark.parametrize("name", sorted(method_names()))
def test_runs_with_equal_seeds_are_equal_and_with_other_seeds_differ(name: str) -> None:
    def trained(seed: int) -> tuple[dict[str, str], list[float]]:
        learner = ReferenceLearner(STREAM, dropout=0.2)  # equal weights: only the run's own draws may differ
        record = run(name, seed=seed, learner=learner)
        return facts(record), learner.parameters()["fc1.weight"].ravel().tolist()

    first, again, other = trained(0), trained(0), trained(1)
    assert first == again
    assert first[1] != other[1]


@cache
def forgetting_of(name: str, strength: float = 2.0) -> float:
    """Return the mean forgetting, in points, over three seeds of a stream that is hard for a narrow network."""
    training = Training(Annealed(0.2, 20), Annealed(0.2, 10), batch_size=16)
    method = build_method(name, {"threshold": 0.97, "ewc_strength": strength})
    values = []
    for seed in range(3):
        stream = prototype_stream(tasks=4, seed=seed)
        learner = ReferenceLearner(stream, hidden=(10, 6), seed=seed)
        values.append(metrics.forgetting(learn(learner, stream, method, training, seed=seed).accuracy))
    return float(np.mean(values))


def test_finetuning_forgets_and_every_remedy_forgets_less() -> None:
    assert forgetting_of("finetune") > 10
    for name in ("gpm", "became", "became-paper", "joint", "imm-mean", "imm-mode", "coma"):
        assert forgetting_of(name) < forgetting_of("finetune") - 5, name


@pytest.mark.parametrize("name", ["ewc", "ewc-online"])
def test_a_stronger_ewc_forgets_less(name: str) -> None:
    weak, medium, strong = (forgetting_of(name, strength) for strength in (0.1, 10.0, 1000.0))
    assert forgetting_of("finetune") >= weak > medium > strong
    assert strong < 3


def test_without_strength_ewc_is_finetuning() -> None:
    assert facts(run("ewc", settings={"ewc_strength": 0.0})) == facts(run("finetune"))


Snapshot = dict[str, NDArray[np.float64]]


def snapshots(name: str, training: Training = TRAINING) -> tuple[RunRecord, dict[tuple[int, int], Snapshot]]:
    """Run a method; return the record, and the weights at the end of (task, stage), where stage 0 is the whole task."""
    learner = ReferenceLearner(STREAM, bias=True)
    weights_at: dict[tuple[int, int], Snapshot] = {}

    def observe(event: EpochEnd | TaskEnd) -> None:
        stage = event.stage if isinstance(event, EpochEnd) else 0
        weights_at[event.task, stage] = learner.parameters()  # Those of the last epoch remain.

    return run(name, learner=learner, training=training, observe=observe), weights_at


def test_gpm_protects_the_spaces_of_old_tasks() -> None:
    record, weights_at = snapshots("gpm")
    probe = ReferenceLearner(STREAM, bias=True)
    for task in (1, 2):
        before, after = weights_at[task - 1, 0], weights_at[task, 0]
        for frozen in {"fc1.bias", "fc2.bias", "heads.0.weight", "heads.1.weight", "heads.2.weight"}:
            if frozen != f"heads.{task}.weight":
                np.testing.assert_array_equal(after[frozen], before[frozen])
        for name in ("fc1.weight", "fc2.weight"):
            change, (rank, width) = after[name] - before[name], record.ranks[task - 1][name]
            assert np.abs(change).max() > 1e-3
            # The change has no part in at least `rank` dimensions of the layer's input space.
            assert np.linalg.matrix_rank(change, tol=1e-10) <= width - rank
            assert record.ranks[task][name] >= (rank, width)
    # The logits of the first task's images have moved much less than under finetuning.
    _, free = snapshots("finetune")
    drift = []
    for snapshot in (weights_at, free):
        logits = []
        for moment in ((0, 0), (1, 0)):
            probe.assign(snapshot[moment])
            logits.append(probe.logits(STREAM.tasks[0].train, 1000)[:, 0])
        drift.append(float(np.linalg.norm(logits[1] - logits[0])))
    assert drift[0] < 0.25 * drift[1]


def test_a_run_reports_once_that_a_space_is_full_and_its_weight_no_longer_moves() -> None:
    """At a threshold of 1, enough inputs fill the space; afterwards the updates of the layer are zero."""
    ended: list[TaskEnd] = []
    learner = ReferenceLearner(STREAM, hidden=(12, 5))
    weights: dict[int, NDArray[np.float64]] = {}

    def observe(event: EpochEnd | TaskEnd) -> None:
        if isinstance(event, TaskEnd):
            ended.append(event)
            weights[event.task] = learner.parameters()["fc2.weight"]

    record = run("gpm", learner=learner, settings={"threshold": 1.0}, observe=observe)
    filled = next(task for task, ranks in enumerate(record.ranks) if ranks["fc2.weight"][0] == 12)
    assert filled < 2
    assert [("fc2.weight" in end.full) for end in ended] == [
        task == filled for task in range(3)
    ]  # It is reported once.
    np.testing.assert_array_equal(weights[filled], weights[2])


def test_biases_are_frozen_unless_the_projector_protects_all_parameters() -> None:
    """Biases are frozen if only matrices are protected; they are trained if the projector protects all parameters."""

    @dataclass(frozen=True)
    class ProtectsAll(GPM):
        protects_all: ClassVar[bool] = True

    for projector, frozen in ((GPM(0.9), True), (ProtectsAll(0.9), False)):
        learner = ReferenceLearner(STREAM, bias=True)
        weights_at: list[Snapshot] = []

        def observe(
            event: EpochEnd | TaskEnd, learner: ReferenceLearner = learner, weights_at: list[Snapshot] = weights_at
        ) -> None:
            if isinstance(event, TaskEnd):
                weights_at.append(learner.parameters())

        learn(learner, STREAM, Method("projected", projector=projector), TRAINING, callbacks=[Listening(observe)])
        assert np.array_equal(weights_at[1]["fc1.bias"], weights_at[0]["fc1.bias"]) == frozen
        np.testing.assert_array_equal(weights_at[1]["heads.0.weight"], weights_at[0]["heads.0.weight"])


def test_finetuning_leaves_other_heads_alone() -> None:
    _, weights_at = snapshots("finetune")
    for task, head in ((1, 0), (1, 2), (2, 0), (2, 1)):
        name = f"heads.{head}.weight"
        np.testing.assert_array_equal(weights_at[task, 0][name], weights_at[task - 1, 0][name])


@pytest.mark.parametrize("name", ["became", "became-paper", "became-half"])
def test_the_merge_is_the_convex_combination_at_alpha(name: str) -> None:
    record, weights_at = snapshots(name)
    interior = 0
    for task in (1, 2):
        alpha = record.alpha[task]
        assert alpha is not None
        interior += 0 < alpha < 1
        for parameter, stable in weights_at[task, 1].items():
            plastic, merged = weights_at[task, 2][parameter], weights_at[task, 0][parameter]
            np.testing.assert_allclose(merged, (1 - alpha) * stable + alpha * plastic, atol=1e-14)
        for head in {0, 1, 2} - {task}:  # The heads of other tasks do not change, to the bit.
            parameter = f"heads.{head}.weight"
            np.testing.assert_array_equal(weights_at[task, 0][parameter], weights_at[task - 1, 0][parameter])
    assert interior == {"became-half": 2}.get(name, interior)
    assert interior or name == "became"


def test_stage_2_is_free_of_the_projection() -> None:
    _, weights_at = snapshots("became")
    for parameter in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "heads.1.weight"):
        assert not np.array_equal(weights_at[1, 1][parameter], weights_at[1, 2][parameter])
    np.testing.assert_array_equal(weights_at[1, 1]["fc1.bias"], weights_at[0, 0]["fc1.bias"])


def test_the_first_task_is_trained_once_for_both_stages() -> None:
    _, weights_at = snapshots("became")
    longer = replace(TRAINING, stage1=Annealed(0.2, 9))
    _, free = snapshots("finetune", training=longer)
    assert (0, 2) not in weights_at
    for parameter, value in free[0, 0].items():
        np.testing.assert_array_equal(weights_at[0, 0][parameter], value)


def test_the_ends_of_a_traced_path_are_the_two_models() -> None:
    alphas = (0.0, 0.5, 1.0)
    record, weights_at = snapshots("became", replace(TRAINING, path_alphas=alphas))
    untraced, _ = snapshots("became")
    assert record.alpha == untraced.alpha  # Tracing does not change the run.
    np.testing.assert_array_equal(record.accuracy, untraced.accuracy)
    probe = ReferenceLearner(STREAM, bias=True)
    assert len(record.paths) == 2
    for task, path in enumerate(record.paths, start=1):
        assert tuple(point.alpha for point in path.points) == alphas
        for point, stage in ((path.points[0], 1), (path.points[-1], 2)):
            probe.assign(weights_at[task, stage])
            tasks = STREAM.tasks[: task + 1]
            assert point.accuracy == pytest.approx(np.mean(accuracies(probe, tasks, 16)[0]))
            assert point.loss == pytest.approx(sum(mean_loss(probe, old.index, old.train, 16) for old in tasks))


def test_a_patience_run_restores_the_best_validation_model() -> None:
    patient = Patience(lr=0.8, patience=2, minimum=0.3, epochs=12)
    learner = ReferenceLearner(STREAM, bias=True)
    losses: dict[int, list[float]] = {}
    restored: dict[int, float] = {}

    def observe(event: EpochEnd | TaskEnd) -> None:
        if isinstance(event, EpochEnd):
            losses.setdefault(event.task, []).append(event.validation_loss)
        else:
            restored[event.task] = mean_loss(learner, event.task, STREAM.tasks[event.task].validation, 16)

    record = run("gpm", learner=learner, training=replace(TRAINING, stage1=patient), observe=observe)
    assert record.epochs == [len(losses[task]) for task in range(3)]
    assert any(losses[task][-1] > min(losses[task]) for task in range(3))
    for task in range(3):
        assert restored[task] == pytest.approx(min(losses[task]), rel=1e-12)


def test_the_training_settings_limit_the_numbers_of_samples() -> None:
    few = run("became", training=replace(TRAINING, projector_samples=2, curvature_samples=8))
    many = run("became")
    assert few.ranks[0]["fc1.weight"][0] <= 2 < many.ranks[0]["fc1.weight"][0]
    assert few.alpha != many.alpha


def test_divergence_is_an_error() -> None:
    with pytest.raises(BecameError, match=r"^the training loss became (nan|inf) in task 1, stage 1, epoch \d+; try a "):
        run("became", training=replace(TRAINING, stage1=Annealed(1e200, 6)))


@pytest.mark.parametrize("name", [*sorted(method_names()), "became+trgp", "ewc+gpm"])
def test_tracing_paths_does_not_change_a_run_to_the_bit(name: str) -> None:
    results = []
    for alphas in ((), (0.0, 0.5, 1.0)):
        learner = ReferenceLearner(STREAM, bias=True)
        record = learn(
            learner, STREAM, build_method(name, SETTINGS), replace(TRAINING, path_alphas=alphas), callbacks=[]
        )
        results.append((facts(replace(record, paths=[])), learner.parameters(), record.paths))
    (plain, weights, no_paths), (traced, same_weights, paths) = results
    assert traced == plain
    for parameter, value in weights.items():
        np.testing.assert_array_equal(same_weights[parameter], value)
    assert no_paths == []
    assert len(paths) == (0 if build_method(name, SETTINGS).rule is None else 2)


@dataclass(frozen=True)
class Cautious(MergeRule):
    """Merges at a share of the alpha of another rule, as a user would write it, without ``needs_losses``."""

    share: float

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        whole: Any = Became(DiagonalFisher()).merge(models, losses).alpha
        alpha = self.share * whole
        return Merged(merge(models[0], models[1], alpha), alpha)


def test_a_rule_of_a_user_gets_the_losses_that_the_rule_inside_it_needs() -> None:
    def first_alpha(rule: MergeRule) -> float:
        method = replace(build_method("became", SETTINGS), rule=rule)
        alpha = learn(ReferenceLearner(STREAM, bias=True), STREAM, method, TRAINING).alpha[1]
        assert alpha is not None
        return alpha

    whole = first_alpha(Became(DiagonalFisher()))
    assert 0 < whole < 1
    assert first_alpha(Cautious(0.5)) == pytest.approx(0.5 * whole, rel=1e-12)


def test_fisher_weighted_averaging_merges_in_a_run() -> None:
    method = replace(build_method("became", SETTINGS), rule=FisherMerge())
    record = learn(ReferenceLearner(STREAM, bias=True), STREAM, method, TRAINING)
    assert record.alpha == [None, None, None]  # Its result is not on the segment between the models.
    mode = learn(ReferenceLearner(STREAM, bias=True), STREAM, replace(method, rule=ModeIMM()), TRAINING)
    np.testing.assert_array_equal(record.accuracy, mode.accuracy)


@dataclass(frozen=True)
class TwoStaged(GPM):
    """A projector with two stages and no region, which records the calls of its hooks."""

    stages: ClassVar[int] = 2
    asked: list[str] = field(default_factory=list, compare=False)

    def prepare(self, start: TaskStart) -> Self:
        self.asked.append(f"prepare {start.index}")
        return self

    def between_stages(self, theta: Params, projectable: frozenset[str]) -> tuple[Self, Params]:
        assert projectable == {"fc1.weight", "fc2.weight"}
        self.asked.append("between")
        return self, {name: value * 0.5 for name, value in theta.items()}

    def end_stage(self, task: int, region: Region | None) -> Self:
        self.asked.append(f"end {task}")
        return self


def test_the_hooks_of_a_projector_are_called_in_the_order_of_a_task() -> None:
    projector = TwoStaged(0.9)
    record = learn(ReferenceLearner(STREAM), STREAM, Method("two", projector=projector), TRAINING)
    assert record.epochs == [9, 9, 9]
    expected = [[f"prepare {task}", f"end {task}", "between", f"end {task}"] for task in range(3)]
    assert projector.asked == ["prepare 0"] + [call for calls in expected for call in calls]
