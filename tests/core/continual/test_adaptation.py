"""Runs in which low-rank adapters learn, or in which some parameters are frozen."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from became_core import BecameError
from became_core.arrays import Params
from became_core.continual import (
    SGD,
    Adam,
    Adaptation,
    Annealed,
    Patience,
    Penalty,
    RunRecord,
    RunState,
    Training,
    build_method,
    learn,
    method_names,
)
from became_core.laplace import Diagonal, LaplacePosterior
from became_core.projection import PROJECTORS, LowRankRegion
from reference.learner import ReferenceLearner
from reference.projection import olora_overlap
from tests.listening import Listening
from tests.streams import prototype_stream

RANK = 2
STREAM = prototype_stream(per_class=8, side=8, validation=0.1)  # so few that their inputs leave directions free
TRAINING = Training(
    Annealed(0.2, 3),
    Annealed(0.2, 2),
    SGD(momentum=0.5),
    batch_size=6,
    projector_samples=None,
    adaptation=Adaptation(rank=RANK),
)
SETTINGS = {"threshold": 1.0, "ewc_strength": 2.0}
FIT = [name for name in method_names() if name not in PROJECTORS or not PROJECTORS[name].no_adapters]


def new_learner(seed: int = 0) -> ReferenceLearner:
    return ReferenceLearner(STREAM, bias=True, dropout=0.1, seed=seed)


Run = tuple[RunRecord, ReferenceLearner, list[RunState]]
RUNS: dict[str, Run] = {}


def states_of(name: str, training: Training = TRAINING) -> Run:
    """Return the record, the learner and all states of a run."""
    key = repr((name, training))
    if key not in RUNS:
        learner, states = new_learner(), list[RunState]()
        looking = [Listening(keep=states.append)]
        record = learn(learner, STREAM, build_method(name, SETTINGS), training, callbacks=looking)
        RUNS[key] = record, learner, states
    return RUNS[key]


def at_ends(name: str, training: Training = TRAINING) -> list[Params]:
    """Return the weights before the run and after each task."""
    ends = [state.theta for state in states_of(name, training)[2] if state.stage is None]
    return [new_learner().parameters(), *ends]


def changes(before: Params, after: Params) -> dict[str, NDArray[np.float64]]:
    return {name: np.asarray(after[name] - before[name]) for name in before}


@pytest.mark.parametrize("name", FIT)
def test_every_method_for_which_it_makes_sense_learns_through_adapters(name: str) -> None:
    thetas = at_ends(name)
    for task, (before, after) in enumerate(pairwise(thetas)):
        by = changes(before, after)
        assert not by["fc1.bias"].any()  # has no adapter, and stands still
        assert by[f"heads.{task}.weight"].any()
    by = changes(thetas[0], thetas[1])
    assert by["fc1.weight"].any()
    assert by["fc2.weight"].any()


def test_the_change_of_a_stage_has_at_most_the_rank_and_not_less() -> None:
    for before, after in pairwise(at_ends("finetune")):
        by = changes(before, after)
        assert [np.linalg.matrix_rank(by[name], tol=1e-10) for name in ("fc1.weight", "fc2.weight")] == [RANK, RANK]


@pytest.mark.parametrize("optimiser", [SGD(momentum=0.5), Adam()], ids=["SGD", "Adam"])
def test_old_logits_stand_still_in_stage_1_under_gpm(optimiser: SGD | Adam) -> None:
    training = replace(TRAINING, optimiser=optimiser, stage1=Annealed(0.02, 3))
    thetas, learner = at_ends("gpm", training), new_learner()
    old = STREAM.tasks[0].train
    logits = []
    for theta in thetas[1:]:
        learner.assign(theta)
        logits.append(learner.logits(old, 100)[:, 0])
    assert np.abs(changes(thetas[1], thetas[2])["fc1.weight"]).max() > 1e-3
    for later in logits[1:]:
        np.testing.assert_allclose(later, logits[0], atol=1e-9)
    learner.assign(at_ends("finetune", training)[2])
    assert np.abs(learner.logits(old, 100)[:, 0] - logits[0]).max() > 1e-3  # without the projector they move


@pytest.mark.parametrize("name", ["became", "became-half"])
def test_a_merge_is_one_of_effective_weights(name: str) -> None:
    record, _, states = states_of(name)
    for task in (1, 2):
        *_, last = (state for state in states if state.task == task and state.stage is not None)
        (after,) = (state.theta for state in states if state.task == task + 1 and state.stage is None)
        assert last.in_stage(2)
        assert last.theta_gp is not None
        assert last.stage is not None
        assert isinstance(last.stage.region, LowRankRegion)
        theta_hat, alpha = last.stage.region.effective(last.theta), record.alpha[task]
        assert alpha is not None
        assert 0 < alpha <= 1
        for name, value in after.items():
            np.testing.assert_allclose(value, (1 - alpha) * last.theta_gp[name] + alpha * theta_hat[name], atol=1e-12)
        by = changes(last.theta_gp, after)
        assert np.linalg.matrix_rank(by["fc1.weight"], tol=1e-10) == RANK


PATIENT = replace(
    TRAINING,
    stage1=Patience(lr=0.3, patience=1, minimum=0.1, epochs=3),
    stage2=Patience(lr=0.3, patience=1, minimum=0.2, epochs=2, restores_best=False),
    optimiser=Adam(),
)


@pytest.mark.parametrize("training", [TRAINING, PATIENT], ids=["annealed", "patient"])
@pytest.mark.parametrize("name", ["became", "ewc"])
def test_a_run_resumed_from_any_state_is_the_same_run(name: str, training: Training) -> None:
    record, learner, states = states_of(name, training)
    for state in states[1::2]:
        other = new_learner(seed=1)  # its own weights must not matter
        resumed = learn(other, STREAM, build_method(name, SETTINGS), training, state=state)
        assert resumed.alpha == record.alpha
        np.testing.assert_array_equal(resumed.accuracy, record.accuracy)
        for key, value in learner.parameters().items():
            np.testing.assert_array_equal(other.parameters()[key], value)


def test_the_optimiser_has_no_state_of_weights_that_have_adapters() -> None:
    optimisers = [state.stage.optimiser for state in states_of("became")[2] if state.stage is not None]
    keys = {f"fc{layer}.weight@{part}" for layer in (1, 2) for part in "AB"}
    for optimiser in optimisers:
        assert isinstance(optimiser, SGD)
        assert {key for key in optimiser.velocity if not key.startswith("heads.")} == keys


def test_the_stages_and_tasks_draw_other_adapters() -> None:
    regions = [s.stage.region for s in states_of("became")[2] if s.stage is not None and s.stage.schedule.epoch == 1]
    rows = [region.scales["fc1.weight@A"] for region in regions if region is not None]
    assert len(rows) == 5
    assert len({row.tobytes() for row in rows}) == 5


@pytest.mark.parametrize("strength", [1.0, 1e8])
def test_a_penalty_is_one_on_effective_weights_and_stable_at_any_strength(strength: float) -> None:
    draw = np.random.default_rng(0)
    theta = {"w": draw.normal(size=(4, 6))}
    fisher, mean = {"w": draw.uniform(size=(4, 6))}, {"w": draw.normal(size=(4, 6))}
    penalty = Penalty(LaplacePosterior(mean, Diagonal(fisher)), strength)
    scales = {"w@A": draw.normal(size=(2, 6)), "w@B": draw.normal(size=(4, 2))}

    def value(scales: Params) -> float:
        gap = theta["w"] + 0.5 * scales["w@B"] @ scales["w@A"] - mean["w"]
        return float(strength / 2 * np.sum(fisher["w"] * gap**2))

    region, nothing = LowRankRegion(scales, scale=0.5), {"w": np.zeros((4, 6))}
    slopes = penalty.add_beneath(nothing, theta | scales, 0.0, region)  # at a rate of 0, the plain gradient
    for key, scale in scales.items():
        step = np.zeros_like(scale)
        step[1, 1] = 1e-6
        ends = [value(scales | {key: scale + sign * step}) for sign in (1, -1)]
        np.testing.assert_allclose(slopes[key][1, 1], (ends[0] - ends[1]) / 2e-6, rtol=1e-6)
    before = value(scales)
    for _ in range(50):
        slopes = penalty.add_beneath(nothing, theta | scales, 0.1, LowRankRegion(scales, scale=0.5))
        scales = {key: scale - 0.1 * slopes[key] for key, scale in scales.items()}
        after = value(scales)
        assert after < before
        before = after


def test_ewc_keeps_effective_weights_near_the_old_ones() -> None:
    thetas = at_ends("finetune"), at_ends("ewc")
    free, bound = (np.abs(changes(theta[1], theta[2])["fc1.weight"]).max() for theta in thetas)
    assert 0 < bound < free


FROZEN = replace(TRAINING, adaptation=Adaptation(freeze=("fc1",)))


@pytest.mark.parametrize("name", ["became", "ewc", "finetune", "ogd", "packnet", "trgp", "imm-mode"])
def test_what_is_frozen_stands_still_to_the_bit_and_is_not_remembered(name: str) -> None:
    thetas = at_ends(name, FROZEN)
    for before, after in pairwise(thetas):
        by = changes(before, after)
        assert not by["fc1.weight"].any()
        assert not by["fc1.bias"].any()
    assert changes(thetas[0], thetas[1])["fc2.weight"].any()
    record, _, states = states_of(name, FROZEN)
    assert all("fc1.weight" not in ranks for ranks in record.ranks)
    projector = states[-1].memory.projector
    assert projector is None or not any("fc1.weight" in key for key in projector.to_arrays())


def test_all_may_be_frozen_but_heads() -> None:
    for adaptation in (Adaptation(freeze=("*",)), Adaptation(("fc2*",), 1, ("fc1", "fc2.weight"))):
        thetas = at_ends("became", replace(TRAINING, adaptation=adaptation))
        by = changes(thetas[0], thetas[3])
        assert not by["fc2.weight"].any()
        assert by["fc1.weight"].any() == (adaptation.rank is not None)
        assert all(by[f"heads.{task}.weight"].any() for task in range(3))


@pytest.mark.parametrize("name", ["trgp", "became+trgp", "hat", "packnet", "ogd", "became+ogd"])
def test_what_adapters_make_no_sense_for_is_refused_with_its_reason(name: str) -> None:
    projector = build_method(name).projector
    assert projector is not None
    reason = projector.no_adapters
    assert reason
    with pytest.raises(BecameError) as raised:
        learn(new_learner(), STREAM, build_method(name), TRAINING)
    assert str(raised.value) == f"{name} is not for low-rank adapters: {reason}; leave out --lora."


@pytest.mark.parametrize(
    ("adaptation", "message"),
    [
        (Adaptation(freeze=("conv*",)), "--freeze conv\\* matches none .* fc1.bias, fc1.weight, fc2.bias, fc2.weight"),
        (Adaptation(freeze=("heads*",)), "--freeze heads\\* matches none"),
        (Adaptation((), 1, ("fc1", "fc3")), "--lora-layers fc3 matches none .* fc1.weight, fc2.weight"),
        (Adaptation(("fc?.weight",), 1), "no layer is left for low-rank adapters"),
        (Adaptation(rank=25), "rank of low-rank adapters is 25, .* above 24; take at most 24"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_in_a_sentence(adaptation: Adaptation, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        learn(new_learner(), STREAM, build_method("gpm"), replace(TRAINING, adaptation=adaptation))


@pytest.mark.parametrize(
    ("name", "adaptation", "message"),
    [
        ("inflora", Adaptation(layers=("nothing*",)), r"--lora-layers nothing\* matches none"),
        ("became+inflora", Adaptation(("fc?.weight",)), "no layer is left for low-rank adapters"),
    ],
)
def test_what_a_projector_of_adapters_adapts_is_checked_as_well(
    name: str, adaptation: Adaptation, message: str
) -> None:
    with pytest.raises(BecameError, match=message):
        learn(new_learner(), STREAM, build_method(name), replace(TRAINING, adaptation=adaptation))


def test_a_rank_that_is_a_projectors_own_may_be_above_all_others() -> None:
    learner, olora = ReferenceLearner(STREAM, hidden=(6, 5)), build_method("olora")
    learn(learner, STREAM, olora, replace(TRAINING, adaptation=Adaptation()))
    with pytest.raises(BecameError, match=r"is 8, .* above 6; take at most 6\."):
        learn(learner, STREAM, olora, replace(TRAINING, adaptation=Adaptation(rank=8)))


def test_a_weight_of_a_lower_rank_has_adapters_of_that_rank() -> None:
    training = replace(TRAINING, adaptation=Adaptation(rank=20))  # fc2 is 16 by 24
    region = next(s.stage.region for s in states_of("finetune", training)[2] if s.stage is not None)
    assert region is not None
    assert [region.scales[f"fc{layer}.weight@B"].shape[1] for layer in (1, 2)] == [20, 16]


@pytest.mark.parametrize(("rank", "scale", "what"), [(0, 1.0, "rank"), (-2, 1.0, "rank"), (4, 0.0, "scale")])
def test_numbers_of_adapters_are_checked(rank: int, scale: float, what: str) -> None:
    with pytest.raises(BecameError, match=f"the {what} of low-rank adapters is"):
        Adaptation(rank=rank, scale=scale)


def test_inflora_learns_b_alone_and_moves_no_old_logits() -> None:
    thetas, learner, old = at_ends("inflora"), new_learner(), STREAM.tasks[0].train
    logits = []
    for theta in thetas[1:]:
        learner.assign(theta)
        logits.append(learner.logits(old, 100)[:, 0])
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-9)
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-9)
    by = changes(thetas[1], thetas[2])["fc1.weight"]
    assert np.linalg.matrix_rank(by, tol=1e-10) == RANK
    regions = [state.stage.region for state in states_of("inflora")[2] if state.stage is not None]
    for region in regions:
        assert isinstance(region, LowRankRegion)
        assert set(region.scales) == {"fc1.weight@B", "fc2.weight@B"}


@pytest.mark.parametrize("name", ["olora", "finetune"])
def test_tasks_of_olora_have_no_overlap_by_the_published_code(name: str) -> None:
    regions = [s.stage.region for s in states_of(name)[2] if s.stage is not None and s.stage.schedule.finished]
    rows = [region.scales["fc1.weight@A"] for region in regions if region is not None]
    assert len(rows) == 3
    overlaps = [olora_overlap(rows[:task], rows[task]) for task in (1, 2)]
    assert all(overlap < 1e-11 for overlap in overlaps) == (name == "olora")


@pytest.mark.parametrize(("name", "rank"), [("inflora", 10), ("became+olora", 8)])
def test_projectors_of_adapters_have_the_published_rank_unless_a_run_names_one(name: str, rank: int) -> None:
    training = replace(TRAINING, adaptation=Adaptation())
    region = next(s.stage.region for s in states_of(name, training)[2] if s.stage is not None)
    assert region is not None
    assert region.scales["fc1.weight@B"].shape == (24, rank)
