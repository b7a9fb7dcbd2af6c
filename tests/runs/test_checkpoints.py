"""Checkpoints: a run that is interrupted anywhere goes on from files as if nothing had happened; damage is noticed."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapters.runs import Checkpoints
from adapters.runs.encoding import MisfitError, concrete_classes, decoded, encoded
from adapters.runs.settings import describe
from became_core import BecameError, precision
from became_core.arrays import named_leaves
from became_core.continual import (
    SGD,
    Adam,
    Adaptation,
    Annealed,
    Memory,
    Patience,
    RunRecord,
    RunState,
    Training,
    build_method,
    learn,
)
from became_core.laplace import Diagonal, Kronecker, LaplacePosterior
from became_core.precision import GramRequest, Precision
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

STREAM = prototype_stream(per_class=16, side=4, validation=0.2)
SETTINGS = {"threshold": 0.9, "ewc_strength": 2.0, "nscl_ratio": 30.0, "ogd_samples": 12, "ogd_capacity": 8}
ANNEALED = Training(
    Annealed(0.2, 2), Annealed(0.2, 1), batch_size=8, optimiser=SGD(momentum=0.5), path_alphas=(0.0, 0.5, 1.0)
)
ADAM = replace(ANNEALED, stage1=Annealed(0.02, 2), stage2=Annealed(0.02, 1), optimiser=Adam())
PATIENT = Training(
    Patience(lr=0.6, patience=1, minimum=0.2, epochs=4),
    Patience(lr=0.6, patience=1, minimum=0.4, epochs=3, restores_best=False),
    batch_size=8,
)


def new_learner(seed: int = 0, *, hidden: tuple[int, int] = (8, 6), bias: bool = True) -> ReferenceLearner:
    return ReferenceLearner(STREAM, hidden=hidden, bias=bias, dropout=0.2, seed=seed)


def checkpoints(folder: Path, name: str = "became", training: Training = ANNEALED, seed: int = 0) -> Checkpoints:
    return Checkpoints(folder, STREAM, build_method(name, SETTINGS), training, seed)


class Stopped(Exception):  # noqa: N818 # it is no error
    pass


def part(kept: Checkpoints, epochs: int | None) -> tuple[RunRecord | None, ReferenceLearner]:
    """Go on from the files with a learner of other weights, for so many epochs and tasks; the record, if it ended."""
    learner = new_learner(seed=1)
    done = 0

    def keep(state: RunState) -> None:
        nonlocal done
        kept.save(state)
        done += 1
        if done == epochs:
            raise Stopped

    state = kept.load(learner)
    if state is None:
        learner = new_learner()
    try:
        return learn(
            learner, STREAM, kept.method, kept.training, state=state, callbacks=[Listening(keep=keep)]
        ), learner
    except Stopped:
        return None, learner


def interrupted(kept: Checkpoints, *, after: int) -> None:
    assert part(kept, after)[0] is None


def facts(record: RunRecord | None) -> dict[str, str]:
    assert record is not None
    return {field.name: repr(getattr(record, field.name)) for field in fields(record) if field.name != "seconds"}


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("became", ANNEALED),
        ("became", PATIENT),
        ("became+trgp", ANNEALED),
        ("became+trgp", PATIENT),
        ("became+ogd", ANNEALED),
        ("ewc", PATIENT),
        ("nscl", ADAM),
        ("gpcns", ANNEALED),
        ("sgp", PATIENT),
        ("joint", ANNEALED),
        ("became", replace(PATIENT, adaptation=Adaptation(("fc1.bias",), rank=2))),
    ],
)
def test_a_run_interrupted_after_any_epoch_is_the_run(name: str, training: Training, tmp_path: Path) -> None:
    method, learner, saved = build_method(name, SETTINGS), new_learner(), list[Checkpoints]()

    def keep(state: RunState) -> None:
        saved.append(checkpoints(tmp_path / str(len(saved)), name, training))
        saved[-1].save(state)

    expected = learn(learner, STREAM, method, training, callbacks=[Listening(keep=keep)])
    assert len(saved) > 8
    for kept in saved:
        other = new_learner(seed=1)
        state = kept.load(other)
        assert state is not None
        record = learn(other, STREAM, method, training, state=state)
        assert facts(record) == facts(expected)
        for parameter, value in learner.parameters().items():
            np.testing.assert_array_equal(other.parameters()[parameter], value)
    # And of one epoch at a time.
    kept = checkpoints(tmp_path / "each", name, training)
    for _ in saved[:-1]:
        interrupted(kept, after=1)
    assert facts(part(kept, None)[0]) == facts(expected)


def test_a_run_that_calibrates_across_tasks_goes_on_with_the_movement_of_the_last_one(tmp_path: Path) -> None:
    method = build_method("became", SETTINGS | {"precision": "across"})
    expected = learn(new_learner(), STREAM, method, ANNEALED)
    kept = Checkpoints(tmp_path, STREAM, method, ANNEALED, 0)
    while (found := part(kept, 1)[0]) is None:
        assert kept.load(new_learner()) is not None
    assert facts(found) == facts(expected)
    assert len(expected.temperatures) == len(STREAM.tasks)


def test_a_state_is_the_same_after_the_disk() -> None:
    """Every leaf of every state, its dtype and its order, and every number, infinities among them."""
    for name, training in (("became+trgp", ANNEALED), ("became+ogd", PATIENT), ("nscl", ADAM)):
        method, states = build_method(name, SETTINGS), list[RunState]()
        learn(new_learner(), STREAM, method, training, callbacks=[Listening(keep=states.append)])
        for state in states:
            plain, arrays = encoded(state)
            text = json.dumps(plain, allow_nan=False)
            again = decoded(json.loads(text), arrays, method.projector, lambda array: array)
            assert encoded(again)[0] == plain
            assert list(named_leaves(again)) == list(named_leaves(state))
            for path, value in encoded(again)[1].items():
                assert value.dtype == arrays[path].dtype
                np.testing.assert_array_equal(value, arrays[path])
            assert again.stage is None or state.stage is None or again.stage.schedule == state.stage.schedule


def test_arrays_have_canonical_names_and_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    interrupted(kept, after=6)
    assert kept.numbers() == [5, 6]
    names = {"000005.json", "000005.safetensors", "000006.json", "000006.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == names
    arrays = load_file(tmp_path / "000006.safetensors")
    theta = new_learner().parameters()
    for name in theta:
        for place in ("theta", "memory.posterior.mean", "memory.posterior.precision.values"):
            assert arrays[f"{place}.{name}"].shape == theta[name].shape
    assert "memory.projector.bases.fc1.weight" in arrays
    assert "stage.optimiser.velocity.fc1.weight" in arrays


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    suffix: str, damage: str, tmp_path: Path
) -> None:
    kept = checkpoints(tmp_path)
    expected = facts(part(checkpoints(tmp_path / "whole"), None)[0])
    interrupted(kept, after=4)
    file = tmp_path / f"000004.{suffix}"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes({"cut": file.read_bytes()[:-3], "flipped": bytes(content), "empty": b""}[damage])
    said: list[str] = []
    state = kept.load(new_learner(), said.append)
    assert state is not None
    assert state.stage is not None
    assert (state.task, state.stage.epochs) == (0, 3)
    assert said == [f"{file} is damaged; it is left out."]
    assert facts(part(kept, None)[0]) == expected


def test_a_run_that_saves_seldom_goes_on_from_before_a_damaged_checkpoint(tmp_path: Path) -> None:
    """The first checkpoint that is saved then has a smaller number than the damaged one."""
    kept = checkpoints(tmp_path)
    interrupted(kept, after=2)
    state = kept.load(new_learner())
    assert state is not None
    damaged = tmp_path / "000009.json"
    damaged.write_text("{}")
    said: list[str] = []
    assert kept.load(new_learner(), said.append) is not None
    assert said == [f"{damaged} is damaged; it is left out."]
    kept.save(state)
    assert kept.last is not None
    assert kept.last.name != damaged.name
    assert damaged.with_suffix(".damaged").read_text() == "{}"


def test_without_any_whole_checkpoint_nothing_is_begun_anew(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    interrupted(kept, after=4)
    (tmp_path / "000004.safetensors").unlink()
    (tmp_path / "000003.json").write_text("{}")
    said: list[str] = []
    with pytest.raises(BecameError, match=r"^no checkpoint in .* is whole; move the folder away to begin anew\.$"):
        kept.load(new_learner(), said.append)
    assert [("missing" in note, "damaged" in note) for note in said] == [(True, False), (False, True)]


def test_a_writing_that_was_cut_short_counts_for_nothing(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    interrupted(kept, after=2)
    (tmp_path / "000003.safetensors").write_bytes(b"half")
    (tmp_path / ".000003.json.123").write_bytes(b"{")
    assert kept.numbers() == [1, 2]
    interrupted(kept, after=2)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (8, 5)}, r"of another network: 'fc2\.weight' is float64 \[6, 8\] there, float64 \[5, 8\] here"),
        ({"bias": False}, r"of another network: the checkpoint has 'fc1\.bias', the network has not"),
    ],
)
def test_another_networks_checkpoint_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    interrupted(kept, after=3)
    with pytest.raises(BecameError, match=message):
        kept.load(new_learner(**change))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed = 0, not 1"),
        ({"name": "gpm"}, r"method\.name = became, not gpm"),
        ({"training": replace(ANNEALED, stage2=Annealed(0.1, 1))}, r"training\.stage2\.lr = 0\.2, not 0\.1"),
        ({"training": replace(ANNEALED, optimiser=SGD(momentum=0.6))}, r"training\.optimiser\.momentum = 0\.5, not"),
        ({"training": replace(ANNEALED, optimiser=Adam())}, r"training\.optimiser = SGD, not Adam"),
        ({"training": replace(ANNEALED, path_alphas=())}, r"training\.path_alphas = \[0\.0, 0\.5, 1\.0\], not \[\]"),
    ],
)
def test_another_configurations_checkpoint_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    interrupted(checkpoints(tmp_path), after=3)
    with pytest.raises(BecameError, match=message):
        checkpoints(tmp_path, **other).load(new_learner())


def test_other_data_are_refused(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    interrupted(kept, after=3)
    images = STREAM.dataset.images.copy()
    images[-1, 0, 0, 0] ^= 1
    other = replace(kept, stream=replace(STREAM, dataset=replace(STREAM.dataset, images=images)))
    with pytest.raises(BecameError, match="of a run with data = "):
        other.load(new_learner())
    with pytest.raises(BecameError, match=r"of a run with task\.3\.classes = "):
        replace(kept, stream=STREAM.first(2)).load(new_learner())


def test_a_run_further_on_is_not_written_over(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    interrupted(kept, after=3)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(BecameError, match="holds a run that is further on; load it or choose another folder"):
        learn(new_learner(), STREAM, kept.method, ANNEALED, callbacks=[kept])
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


PLACES = [
    ("task",),
    ("stage", "schedule", "kind"),
    ("memory", "projector", "kind"),
    ("theta", "fc1.weight"),
    ("record",),
]
WRONG = [None, "array", 3, [1], {"kind": "TaskStream"}]
RIGHT = [(("task",), 3), (("theta", "fc1.weight"), "array")]


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path in PLACES for value in WRONG if (path, value) not in RIGHT]
)
def test_what_is_no_state_is_said_with_its_place(path: tuple[str, ...], value: Any) -> None:
    states: list[RunState] = []
    method = build_method("became", SETTINGS)
    learn(new_learner(), STREAM, method, ANNEALED, callbacks=[Listening(keep=states.append)])
    plain, arrays = encoded(states[6])
    place = plain
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(MisfitError, match=".".join(path).removesuffix(".kind")):
        decoded(plain, arrays, method.projector, lambda array: array)


def test_what_an_earlier_version_did_not_save_has_its_default() -> None:
    method, states = build_method("became", SETTINGS), list[RunState]()
    learn(new_learner(), STREAM, method, ANNEALED, callbacks=[Listening(keep=states.append)])
    plain, arrays = encoded(states[6])
    del plain["memory"]["movement"]
    assert decoded(plain, arrays, method.projector, lambda array: array).memory.movement is None


def test_an_option_that_is_as_it_always_was_does_not_part_runs_from_those_of_an_earlier_version() -> None:
    usual = describe(STREAM, build_method("became", SETTINGS), ANNEALED, 0)
    assert not [name for name in usual if "calibrates" in name]
    across = describe(STREAM, build_method("became", SETTINGS | {"precision": "across"}), ANNEALED, 0)
    assert across.keys() - usual.keys() == {"method.calibrates", "method.rule.precision.calibrates"}


def test_a_posterior_of_any_precision_can_be_saved() -> None:
    every = {each for name in precision.__all__ if isinstance(each := getattr(precision, name), type)} - {
        Precision,
        GramRequest,
    }
    assert set(concrete_classes(Precision)) >= every
    theta, weights = new_learner().parameters(), ("fc1.weight", "fc2.weight")
    factors = {name: (np.eye(theta[name].shape[1]), np.eye(theta[name].shape[0])) for name in weights}
    held = Kronecker(factors, {"fc1.weight": np.ones(())}) + Diagonal({name: theta[name] ** 2 for name in theta})
    begun = RunState.initial(new_learner(), STREAM, build_method("finetune", SETTINGS))
    state = replace(begun, memory=Memory(posterior=LaplacePosterior(theta, held)))
    plain, arrays = encoded(state)
    again = decoded(json.loads(json.dumps(plain)), arrays, None, lambda array: array)
    assert again.memory.posterior is not None
    assert again.memory.posterior.loss(begun.theta) == 0
    moved = {name: value + 1 for name, value in theta.items()}
    assert float(again.memory.posterior.loss(moved)) == float(LaplacePosterior(theta, held).loss(moved)) > 0


def test_an_array_that_nothing_asks_for_is_refused() -> None:
    state = RunState.initial(new_learner(), STREAM, build_method("finetune", SETTINGS))
    plain, arrays = encoded(state)
    with pytest.raises(MisfitError, match=r"nothing asks for the array 'theta\.fc9'"):
        decoded(plain, arrays | {"theta.fc9": np.zeros(1)}, None, lambda array: array)
