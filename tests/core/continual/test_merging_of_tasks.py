"""Methods that merge tasks, in whole runs: which models are merged, and where each task's own model begins."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from became_core.continual import Annealed, EpochEnd, RunRecord, TaskEnd, Training, build_method, learn
from became_core.continual.evaluation import mean_loss
from became_core.continual.measurement import Measurement
from became_core.continual.methods import Method, Transfer
from became_core.laplace import Diagonal, LaplacePosterior
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream()
TRAINING = Training(Annealed(0.2, 6), Annealed(0.2, 3), batch_size=16)
Weights = dict[str, NDArray[np.float64]]
SHARED = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def run_models(name: str, **settings: Any) -> tuple[RunRecord, list[Weights], list[Weights]]:
    """Run a method; return the record, each task's own model (the end of stage 1), and what it was merged to."""
    learner = ReferenceLearner(STREAM, bias=True)
    own: dict[int, Weights] = {}
    merged: list[Weights] = []

    def observe(event: EpochEnd | TaskEnd) -> None:
        if isinstance(event, TaskEnd):
            merged.append(learner.parameters())
        elif event.stage == 1:
            own[event.task] = learner.parameters()

    method = build_method(name, settings)
    record = learn(learner, STREAM, method, TRAINING, callbacks=[Listening(observe)])
    return record, [own[task] for task in range(3)], merged


def test_mean_imm_is_the_mean_of_all_tasks_models() -> None:
    record, own, merged = run_models("imm-mean")
    for task in range(3):
        for name in SHARED:
            np.testing.assert_allclose(merged[task][name], np.mean([m[name] for m in own[: task + 1]], 0), atol=1e-12)
    assert record.alpha == [None, pytest.approx(1 / 2), pytest.approx(1 / 3)]


def test_mode_imm_is_the_mean_of_all_models_weighted_by_their_precisions() -> None:
    _, own, merged = run_models("imm-mode")
    probe = ReferenceLearner(STREAM, bias=True)
    fishers = []
    for task, theta in zip(STREAM.tasks, own, strict=True):
        probe.assign(theta)
        fishers.append(Measurement(probe, task, TRAINING, "empirical", 0, "posterior").diagonal().values)
    for name in SHARED:
        weighed = sum(fisher[name] * theta[name] for fisher, theta in zip(fishers, own, strict=True))
        total = sum(fisher[name] for fisher in fishers)
        known = total > 0
        assert np.any(known)
        np.testing.assert_allclose(merged[2][name][known], (weighed / np.where(known, total, 1))[known], atol=1e-9)


@pytest.mark.parametrize("name", ["imm-mean", "imm-mode", "coma"])
def test_a_head_is_that_of_its_own_model_and_later_merges_do_not_change_it(name: str) -> None:
    _, own, merged = run_models(name)
    for task in range(3):
        assert not np.array_equal(merged[2]["fc1.weight"], own[task]["fc1.weight"])  # a merge changes the weights
        for later in range(task, 3):
            np.testing.assert_array_equal(merged[later][f"heads.{task}.weight"], own[task][f"heads.{task}.weight"])


def test_coma_uses_one_coefficient_for_each_merge_and_begins_at_the_merged_model() -> None:
    record, own, merged = run_models("coma", coma_alpha=(0.25,))
    assert record.alpha == [None, 0.25, 0.25]
    for task in (1, 2):
        for name in SHARED:
            expected = 0.75 * merged[task - 1][name] + 0.25 * own[task][name]
            np.testing.assert_allclose(merged[task][name], expected, atol=1e-12)
    assert run_models("coma", coma_alpha=(0.25, 0.75))[0].alpha == [None, 0.25, 0.75]
    _, own_alone, merged_alone = run_models("coma", coma_alpha=(0.0,))
    for name in SHARED:  # At alpha 0 the merged model stays that of the first task.
        np.testing.assert_array_equal(merged_alone[2][name], own_alone[0][name])


def moved(own: list[Weights], origin: Weights, task: int) -> float:
    return float(np.sqrt(sum(np.sum((own[task][name] - origin[name]) ** 2) for name in SHARED)))


def test_training_begins_at_the_model_before_with_transfer_and_at_the_initial_weights_without() -> None:
    initial = ReferenceLearner(STREAM, bias=True).parameters()
    _, with_transfer, _ = run_models("imm-mean")
    _, without, _ = run_models("imm-mean", imm_transfer=False)
    for task in (1, 2):
        assert moved(with_transfer, with_transfer[task - 1], task) < moved(with_transfer, initial, task)
        assert moved(without, initial, task) < moved(without, without[task - 1], task)


def test_a_stronger_pull_keeps_a_tasks_model_nearer_to_the_one_before() -> None:
    distances = []
    for pull in (0.0, 0.1, 10.0):
        _, own, _ = run_models("imm-mean", imm_pull=pull)
        distances.append(moved(own, own[0], 1))
    assert distances[0] > distances[1] > 10 * distances[2] > 0
    # Even from the initial weights, the pull is to the model of the task before.
    _, own, _ = run_models("imm-mode", imm_pull=10.0, imm_transfer=False)
    assert moved(own, own[0], 1) < 0.1 * moved(own, ReferenceLearner(STREAM, bias=True).parameters(), 1)


def test_only_the_models_that_are_needed_are_stored() -> None:
    before, first, second = ({"w": np.full(2, value)} for value in (0.0, 1.0, 2.0))
    for transfer, names in (
        (Transfer(), {"previous"}),
        (Transfer(weights=False), {"initial"}),
        (Transfer(weights=False, pull=1.0), {"initial", "previous"}),
    ):
        models = transfer.models_after(transfer.models_after({}, before, first), first, second)
        assert set(models) == names
        assert models.get("initial", before) is before
        assert models.get("previous", second) is second


def test_the_ablations_are_the_ends_the_middle_and_the_best_of_the_path() -> None:
    ends = {name: run_models(name) for name in ("became-0", "became-half", "became-1")}
    for name, alpha in (("became-0", 0.0), ("became-half", 0.5), ("became-1", 1.0)):
        assert ends[name][0].alpha == [None, alpha, alpha]
    for name in SHARED:
        np.testing.assert_array_equal(ends["became-0"][2][1][name], ends["became-0"][1][1][name])
    record, own, merged = run_models("became-grid", grid_points=5)
    assert set(record.alpha[1:]) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    probe = ReferenceLearner(STREAM, bias=True)

    def loss(theta: Weights) -> float:
        probe.assign(theta)
        return sum(mean_loss(probe, task.index, task.train, 16) for task in STREAM.tasks[:2])

    # The first merge has the same two ends in all of them.
    losses = {name: loss(gradient[2][1]) for name, gradient in ends.items()}
    assert loss(merged[1]) <= min(losses.values())
    assert loss(own[1]) == losses["became-0"]


def penalty_of(method: Method, minima: list[Weights], fishers: list[Weights]) -> LaplacePosterior:
    posterior = None
    for theta, fisher in zip(minima, fishers, strict=True):
        posterior = method.updated_posterior(posterior, theta, Diagonal(fisher))
    assert posterior is not None
    return posterior


def test_ewc_is_the_sum_of_every_old_tasks_quadratic_and_online_ewc_one_that_decays() -> None:
    """The importance of a head is that of its own task; the head of a later task has none."""
    draw = np.random.default_rng(0)
    shapes = {"fc.weight": (3, 2), "heads.0.weight": (2, 3), "heads.1.weight": (2, 3)}
    minima: list[Weights] = [{name: draw.normal(size=shape) for name, shape in shapes.items()} for _ in range(3)]
    fishers: list[Weights] = [
        {name: draw.random(shape) * (name in ("fc.weight", f"heads.{task}.weight")) for name, shape in shapes.items()}
        for task in range(3)
    ]
    theta = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    gradient = penalty_of(build_method("ewc"), minima, fishers).gradient(theta)
    for name in shapes:
        expected = sum(fisher[name] * (theta[name] - at[name]) for fisher, at in zip(fishers, minima, strict=True))
        np.testing.assert_allclose(gradient[name], expected, atol=1e-12)
    online = penalty_of(build_method("ewc-online", {"decay": 0.5}), minima, fishers)
    for name, value in online.precision.diagonal().items():
        np.testing.assert_allclose(value, 0.25 * fishers[0][name] + 0.5 * fishers[1][name] + fishers[2][name])
        np.testing.assert_array_equal(online.mean[name], minima[2][name])


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "diagonal"},
        {"precision": "kronecker"},
        {"per": "layer"},
        {"per": "leaf"},
        {"precision": "kronecker", "per": "layer"},
    ],
    ids=str,
)
def test_became_merges_by_other_curvatures_and_in_groups(settings: dict[str, Any]) -> None:
    usual, _, _ = run_models("became")
    record, own, merged = run_models("became", **settings)
    learner, method = ReferenceLearner(STREAM, bias=True), build_method("became", settings)
    traced = learn(learner, STREAM, method, replace(TRAINING, path_alphas=(0.0, 1.0)))
    assert traced.alpha == record.alpha  # looking changes nothing
    assert all(alpha is not None and 0 <= alpha <= 1 for alpha in record.alpha[1:])
    assert record.alpha != usual.alpha
    changed = [not np.array_equal(merged[1][name], own[1][name]) for name in SHARED]
    assert any(changed)


@pytest.mark.parametrize(("method", "per"), [("became-curve", {}), ("became", {"per": "weight", "shrinkage": 0.5})])
def test_weights_have_coefficients_of_their_own_beside_factors_of_old_tasks(method: str, per: dict[str, Any]) -> None:
    record, own, merged = run_models(method, precision="kronecker", **per)
    assert len(record.accuracy) == len(STREAM.tasks)
    changed = [not np.array_equal(merged[1][name], own[1][name]) for name in SHARED]
    assert any(changed)
