"""One description of a configuration: presets, records, and the command that repeats a run all give it back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.mnist import load_mnist
from adapters.cli.jobs import requested_jobs
from adapters.cli.options import parse, request_of, request_type
from adapters.runs.configuration import Configuration, full_method_name
from adapters.runs.options import GROUPS, options
from adapters.runs.repeating import command_words
from adapters.torch.run import BACKEND
from became_core import BecameError
from became_core.continual import (
    Adaptation,
    Augmentation,
    BayesianDetector,
    PlateauDetector,
    RelativeRates,
    Watch,
    build_method,
)


def configured(method: str = "became", preset: str | None = None, **values: Any) -> Configuration:
    return Configuration.of(values, method, preset)


def test_without_options_it_is_the_demo_on_the_embedded_benchmark() -> None:
    configuration = configured()
    assert (configuration.benchmark, configuration.tasks, configuration.first) == ("split-mnist", 5, 5)
    for name, value in BENCHMARKS["split-mnist"].presets["demo"].values.items():
        assert {**vars(configuration), **configured("gpm").settings}[name] == value


def test_every_option_reaches_the_parts_that_it_is_for() -> None:
    configuration = configured(
        "became+nscl", benchmark="split-cifar100", tasks=20, epochs=3, stage2_epochs=2, lr=0.2, batch_size=8,
        validation=0.1, projector_samples=11, curvature_samples=0, path_points=3, network="mlp", class_order="seeded",
        augment=True, fisher="true", decay=0.5, per="layer", precision="kronecker", head_rate=2.0, norm_rate=0.5,
        first_rate=4.0, norm_penalty=3.0, nscl_ratio=7.0, momentum=0.5, weight_decay=0.25, freeze=("conv1",), lora=4,
        lora_layers=("conv*", "fc1"), lora_scale=0.5,
    )  # fmt: skip
    training, method = configuration.training(), configuration.method("became+nscl")
    assert (training.stage1.epochs, training.stage2.epochs) == (3, 2)
    assert training.stage1.lr == training.stage2.lr == 0.2
    assert (training.batch_size, training.projector_samples, training.curvature_samples) == (8, 11, None)
    assert training.augmentation == Augmentation(padding=4, flips=True)
    assert training.relative == RelativeRates(heads=2.0, norms=0.5, first=4.0)
    assert training.adaptation == Adaptation(freeze=("conv1",), rank=4, layers=("conv*", "fc1"), scale=0.5)
    assert training.path_alphas == (0.0, 0.5, 1.0)
    assert (training.optimiser.momentum, training.optimiser.weight_decay) == (0.5, 0.25)  # type: ignore[union-attr]
    assert method == build_method(
        "became+nscl",
        {
            "decay": 0.5,
            "per": "layer",
            "precision": "kronecker",
            "fisher": "true",
            "norm_penalty": 3.0,
            "nscl_ratio": 7.0,
        },
    )
    record = configuration.to_json()
    assert (record["benchmark"], record["tasks"], record["first"], record["class_order"]) == (
        "split-cifar100", 20, 20, "seeded",
    )  # fmt: skip
    assert (record["network"], record["validation"], record["nscl_ratio"]) == ("mlp", 0.1, 7.0)


def test_curvature_data_and_tempering_reach_the_stream_and_the_method() -> None:
    dataset = load_mnist()
    plain = configured().stream(dataset, 0)
    held_out = configured(curvature_data="validation", temper="calibrated")
    assert held_out.method("became") == replace(configured().method("became"), temper="calibrated")
    for before, after in zip(plain.tasks, held_out.stream(dataset, 0).tasks, strict=True):
        assert before.curvature is None
        np.testing.assert_array_equal(after.curvature, before.validation)
    augmented = configured(curvature_data="augmented", curvature_samples=7).stream(dataset, 0)
    assert len(augmented.dataset.images) == len(dataset.images) + 7 * len(plain.tasks)


def test_scores_on_validation_are_of_the_held_out_samples_and_training_is_the_same() -> None:
    dataset = load_mnist()
    plain, scored = (configured(score_on=part).stream(dataset, 0) for part in ("test", "validation"))
    for before, after in zip(plain.tasks, scored.tasks, strict=True):
        np.testing.assert_array_equal(after.test, before.validation)
        np.testing.assert_array_equal(after.train, before.train)
        np.testing.assert_array_equal(after.validation, before.validation)


def test_boundaries_are_watched_for_only_if_they_are_unknown() -> None:
    assert configured("became").watch() is None
    watch = configured("became", boundaries="unknown", hazard=0.2, reservoir=99, gradual=7).watch()
    assert watch is not None
    assert isinstance(watch.detector, BayesianDetector)
    assert (watch.detector.hazard, watch.reservoir, watch.gradual) == (0.2, 99, 7)
    plateaus = configured("became", boundaries="unknown", detector="plateau").watch()
    assert plateaus == Watch(PlateauDetector())


def test_a_single_head_is_one_for_all_tasks() -> None:
    dataset = load_mnist()
    assert not configured("became").stream(dataset, 0).shared_head
    stream = configured("became", single_head=True).stream(dataset, 0)
    assert stream.shared_head
    assert [task.classes for task in stream.tasks[:2]] != [(0, 1), (0, 1)]  # of labels, in an order that is drawn
    assert set(stream.targets[stream.tasks[3].train].tolist()) == {0, 1}


def test_stage_1_of_a_patient_schedule_ends_on_its_best_model_and_stage_2_on_its_last() -> None:
    training = configured("gpm", "paper").training()
    assert (training.stage1.restores_best, training.stage2.restores_best) == (True, False)


def test_a_value_that_is_given_holds_for_every_projector_and_the_others_are_the_projectors_own() -> None:
    gpm, sgp = (
        configured(method, "paper", benchmark="split-miniimagenet", threshold=0.9).settings for method in ("gpm", "sgp")
    )
    assert gpm["threshold"] == sgp["threshold"] == 0.9
    assert (gpm["increment"], sgp["increment"]) == (0.0003, 0.001)


def test_a_run_is_the_same_whatever_settings_other_methods_have() -> None:
    assert configured("ewc", threshold=0.5) == configured("ewc", threshold=0.9)
    assert set(configured("ewc").settings) == {"ewc_strength"}


def test_the_number_of_tasks_chooses_the_preset() -> None:
    ratios = [
        configured("nscl", "nscl", benchmark="split-cifar100", tasks=tasks).settings["nscl_ratio"] for tasks in (10, 20)
    ]
    assert ratios == [10, 30]


@pytest.mark.parametrize(
    ("values", "method", "preset", "message"),
    [
        ({"benchmark": "split-cifar"}, "gpm", None, "no benchmark 'split-cifar'; did you mean 'split-cifar100'"),
        ({}, "gpm", "nscl", "split-mnist has no preset 'nscl'; choose from demo, paper, quick"),
        ({}, "gmp", None, "no method 'gmp'; did you mean 'gpm'"),
        ({"network": "alexnett"}, "gpm", None, "no network 'alexnett'; did you mean 'alexnet'"),
        ({"epochs": 0}, "gpm", None, "0 epochs"),
        ({"lr": -0.1}, "gpm", None, "lr -0.1"),
        ({"batch_size": 0}, "gpm", None, "--batch-size is 0"),
        ({"projector_samples": -1}, "gpm", None, "--projector-samples is -1"),
        ({"threads": 0}, "gpm", None, "--threads is 0; it must be at least 1"),
        ({"path_points": 1}, "gpm", None, "--path-points must be 0 or at least 2"),
        ({}, "became+gmp", None, "no projector 'gmp'; did you mean 'gpm'"),
        ({}, "joint+gpm", None, "joint training sees all tasks"),
        ({"momentum": 1.0}, "gpm", None, "momentum is 1.0"),
        ({"lora": 0}, "gpm", None, "the rank of low-rank adapters is 0; it must be at least 1"),
        ({"lora": 2, "lora_scale": 0.0}, "gpm", None, "the scale of low-rank adapters is 0.0; it must be above 0"),
        ({"optimiser": "adam", "momentum": 0.5}, "gpm", None, "--momentum is SGD's"),
        ({"weight_decay": -1.0}, "gpm", None, "weight decay is -1.0"),
        ({"threshold": 1.5}, "gpm", None, "threshold is 1.5"),
        ({"ewc_strength": -1.0}, "ewc", None, "strength is -1.0"),
        *(
            (
                {option: number},
                "became+gpm",
                None,
                f"--{option.replace('_', '-')} is {number}; it must be a finite number",
            )
            for option in ("lr", "increment", "threshold", "validation", "weight_decay", "norm_penalty")
            for number in (float("nan"), float("inf"), -float("inf"))
        ),
        ({"ewc_strength": float("inf")}, "ewc", None, "--ewc-strength is inf; it must be a finite number"),
        ({"increment": -0.1}, "gpm", None, "the threshold grows by -0.1 a task; the increment must be at least 0"),
        ({"hazard": 0.0}, "gpm", None, "the hazard is 0.0; give a probability between 0 and 1"),
        ({"hazard": 1.0}, "gpm", None, "the hazard is 1.0; give a probability between 0 and 1"),
        ({"reservoir": 0}, "gpm", None, "a reservoir of 0 samples holds nothing; let it hold at least 1"),
        ({"first": 0}, "gpm", None, "the first 0 tasks are asked for; give at least 1"),
        ({"gradual": -1}, "gpm", None, "tasks change over -1 samples; give at least 0"),
        ({"momenta": 3}, "gpm", None, "no option 'momenta'; did you mean 'momentum'"),
        ({"score_on": "validation", "validation": 0.0}, "gpm", None, "^--score-on validation scores models on "),
        *(
            ({"curvature_data": "validation", **values}, "became", None, message)
            for values, message in (
                ({"validation": 0.0}, "^--curvature-data validation measures on held-out samples, and --validation 0 "),
                ({"temper": "rise"}, "^--temper rise compares held-out samples with those of --curvature-data, and "),
                ({"boundaries": "unknown"}, "^--curvature-data validation is for announced tasks; where boundaries "),
            )
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(
    values: dict[str, Any], method: str, preset: str | None, message: str
) -> None:
    with pytest.raises(BecameError, match=message):
        Configuration.of(values, method, preset)


def test_every_value_of_every_preset_is_an_option_and_every_preset_gives_all_that_has_no_default() -> None:
    for name in BENCHMARKS.names:
        benchmark = BENCHMARKS[name]
        for tasks, presets in ((benchmark.tasks, benchmark.presets), *benchmark.otherwise.items()):
            for preset in presets:
                for method in ("became", "sgp", "hat"):
                    configured(method, preset, benchmark=name, tasks=tasks)


def test_options_of_one_configuration_are_in_groups_and_say_whose_they_are() -> None:
    known = options()
    assert {option.group for option in known.values()} == set(GROUPS)
    assert all(option.help for option in known.values())
    assert "(sgp, gpcns)" in known["scale"].help
    assert "(nscl)" in known["nscl_ratio"].help  # a preset gives it, so that its default is not what it will be
    assert "default: 200" in known["ogd_samples"].help
    assert all(name in known["network"].help for name in ("mlp", "alexnet", "resnet18"))


@pytest.mark.parametrize(
    ("method", "projector", "name"),
    [
        ("became", "sgp", "became+sgp"),
        ("became", None, "became"),
        ("became+trgp", "sgp", "became+trgp"),
        ("gpm", "sgp", "gpm"),
        ("hat", "sgp", "hat"),
        ("joint", "sgp", "joint"),
        ("ewc", "none", "ewc+none"),
    ],
)
def test_a_projector_is_for_methods_that_name_none_and_take_one(method: str, projector: str | None, name: str) -> None:
    assert full_method_name(method, projector) == name


# Values that differ from every preset's, in which each option can be told apart.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "tasks": st.sampled_from([2, 5, 10]),
    "first": st.integers(1, 2),
    "class_order": st.sampled_from(["label", "seeded"]),
    "single_head": st.just(True),
    "boundaries": st.sampled_from(["known", "unknown"]),
    "detector": st.sampled_from(["bayesian", "plateau"]),
    "hazard": st.floats(0.001, 0.5),
    "reservoir": st.integers(1, 999),
    "gradual": st.integers(0, 999),
    "validation": st.floats(0, 0.5),
    "augment": st.booleans(),
    "network": st.sampled_from(["mlp", "alexnet"]),
    "norm": st.sampled_from(["batch", "running", "group"]),
    "mixed_precision": st.just(True),
    "dropout_masks": st.sampled_from(["numpy", "framework"]),
    "schedule": st.sampled_from(["annealed", "stepped", "patience"]),
    "lr": st.floats(1e-6, 10),
    "epochs": st.integers(1, 300),
    "stage2_epochs": st.integers(1, 300),
    "lr_factor": st.floats(1.5, 10),
    "lr_steps": st.lists(st.floats(0.01, 0.99), max_size=3).map(tuple),
    "lr_patience": st.integers(1, 9),
    "lr_minimum": st.floats(0, 1e-6),  # at most the smallest lr
    "head_rate": st.floats(0.1, 10),
    "norm_rate": st.floats(0.1, 10),
    "first_rate": st.floats(0.1, 10),
    "freeze": st.lists(st.sampled_from(["conv1", "fc*"]), max_size=2).map(tuple),
    "lora": st.integers(1, 9),
    "lora_layers": st.lists(st.sampled_from(["conv2", "fc*"]), min_size=1, max_size=2).map(tuple),
    "lora_scale": st.floats(0.1, 10),
    "weight_decay": st.floats(0, 1),
    "batch_size": st.integers(1, 99),
    "projector_samples": st.integers(0, 99),
    "curvature_samples": st.integers(0, 99),
    "path_points": st.sampled_from([0, 2, 11]),
    "device": st.sampled_from(["auto", "cpu", "cuda:1"]),
    "threads": st.integers(1, 9),
    "save_every": st.sampled_from([0.0, 60.0]),
    "compile": st.just(True),
    "deterministic": st.just(True),
    "tracker": st.sampled_from(["none", "tensorboard", "trackio"]),
    "data_dir": st.sampled_from([Path("/data"), Path("/data/a b")]),
    "decay": st.floats(0, 1),
    "per": st.sampled_from(["model", "layer", "leaf"]),
    "precision": st.sampled_from(["diagonal", "kronecker", "exact", "across"]),
    "fisher": st.sampled_from(["empirical", "true", "sampled"]),
    "temper": st.sampled_from(["none", "curvature", "rise", "calibrated"]),
    "threshold": st.floats(0.5, 0.99),
    "increment": st.floats(0, 0.1),
    "scale": st.floats(1, 9),
    "norm_penalty": st.floats(0, 9),
    "coma_alpha": st.lists(st.floats(0, 1), min_size=1, max_size=3).map(tuple),
    "imm_transfer": st.booleans(),
    "imm_pull": st.floats(0, 9),
}
COMMANDS = st.fixed_dictionaries({}, optional=VALUES)
METHODS = st.sampled_from(["became", "became+sgp", "gpm", "coma", "imm-mean", "became+nscl"])


def parsed(words: list[str], method: str, kind: type) -> Configuration:
    """The configuration that the command line gives, whose options are those of a kind of request."""
    request = request_of(parse(kind, "became run", ["--methods", method, *words]))
    (job,) = requested_jobs(request, lambda: BACKEND)
    return job.configuration


@pytest.fixture(scope="module")
def kind() -> type:
    """The options of a run, made once: tyro reads each kind of request only once."""
    return request_type(backend=False, completing=False)


@settings(max_examples=60, deadline=None)
@given(values=COMMANDS, method=METHODS, preset=st.sampled_from(["quick", "paper"]))
def test_a_command_gives_a_configuration_that_gives_the_command(
    kind: type, values: dict[str, Any], method: str, preset: str
) -> None:
    configuration = Configuration.of(values, method, preset)
    words = command_words(configuration, method, preset)
    again = parsed(words, method, kind)
    assert again == configuration
    assert command_words(again, method, preset) == words


@settings(max_examples=60, deadline=None)
@given(values=COMMANDS, method=METHODS, preset=st.sampled_from(["quick", "paper"]))
def test_a_record_gives_the_configuration_back(values: dict[str, Any], method: str, preset: str) -> None:
    configuration = Configuration.of(values, method, preset)
    record = json.loads(json.dumps(configuration.to_json()))
    hints = {**json.loads(json.dumps(configuration.hints())), "data_dir": configuration.data_dir}
    read = Configuration.from_json(record, method)
    assert read.to_json() == configuration.to_json()
    assert Configuration(**{**vars(read), **hints}) == configuration
    assert set(record).isdisjoint(hints)


def test_every_option_is_drawn_by_these_properties() -> None:
    """All but those of one method or projector, which are drawn by those of another of their type."""
    others = {"benchmark", "optimiser", "momentum", "nscl_ratio", "nscl_floored", "ogd_samples", "ogd_capacity"}
    others |= {"ewc_strength", "packnet_share", "packnet_even", "packnet_retraining", "grid_points"}
    others |= {"hat_sharpness", "hat_sparsity", "hat_clamped"}
    others |= {"curvature_data", "score_on"}  # which depend on other options
    others |= {"pretrained", "shrinkage"}  # of networks of the hub, and of the merge of single weights
    others |= {"task_column", "target_column", "target_kind", "head", "context"}
    assert set(options()) == set(VALUES) | others
    kinds = {get_origin(option.type) or option.type for name, option in options().items() if name in VALUES}
    assert {get_origin(options()[name].type) or options()[name].type for name in others} <= kinds
    assert len(get_args(options()["optimiser"].type)) == 2


def test_settings_of_a_benchmark_are_recorded_with_its_runs_alone() -> None:
    configuration = configured("gpm", benchmark="tabular", task_column="street", head="own")
    values = configuration.to_json()
    assert (values["task_column"], values["target_column"], values["head"]) == ("street", "target", "own")
    assert Configuration.from_json(values, "gpm") == configuration
    assert "street" in command_words(configuration, "gpm")
    assert "task_column" not in configured("gpm", task_column="street").to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momenta": 3}, "config.json has an unknown option 'momenta'; resume with the version that started this run."),
        ({"lr": None}, "config.json lacks the option 'lr'; resume with the version that started this run."),
    ],
)
def test_a_record_of_another_version_is_refused_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    gone = [name for name, value in changes.items() if value is None]
    record = {name: value for name, value in (configured().to_json() | changes).items() if name not in gone}
    with pytest.raises(BecameError) as refused:
        Configuration.from_json(record, "became")
    assert str(refused.value) == message
