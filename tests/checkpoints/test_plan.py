"""A plan in mergekit's words runs as it says, or is refused by the word that is not known."""

from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_allclose, assert_array_equal

from adapters.checkpoints import (
    MergePlan,
    PlannedModel,
    add_fisher_files,
    merge_checkpoints,
    open_checkpoint,
    preview,
    read_plan,
)
from adapters.checkpoints.card import yaml_lines
from adapters.checkpoints.plan import METHODS
from adapters.checkpoints.rules import RULES
from became_core import BecameError
from tests.checkpoints.models import arrays, merged, pair, refused, saved

pytest.importorskip("yaml")

MERGEKIT = """
models:
  - model: A.safetensors
    parameters:
      weight: 1.0
  - model: B.safetensors
    parameters:
      weight:
        - filter: mlp
          value: [0.0, 0.5, 1.0]
        - value: 0.5
merge_method: linear
parameters:
  normalize: true
dtype: bfloat16
"""


def plan_from(tmp_path: Path, text: str) -> MergePlan:
    file = tmp_path / "plan.yaml"
    file.write_text(text, encoding="utf-8")
    return read_plan(file)


def test_a_plan_of_mergekit_is_understood(tmp_path: Path) -> None:
    plan = plan_from(tmp_path, MERGEKIT)
    assert plan.merge_method == "linear"
    assert plan.normalize
    assert plan.out_dtype == "BF16"
    weight: Any = plan.models[1].weight
    assert [weight.at("layers.0.mlp.weight", depth) for depth in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.25, 0.5, 1.0]
    assert weight.at("layers.0.attn.weight", 1.0) == 0.5
    assert plan.models[0].model == Path("A.safetensors")


def test_a_word_without_a_value_is_not_given(tmp_path: Path) -> None:
    assert plan_from(tmp_path, f"{MERGEKIT}out_dtype:\n").out_dtype == "BF16"
    assert plan_from(tmp_path, MERGEKIT.replace("bfloat16", "\nout_dtype: float16")).out_dtype == "F16"


def test_a_number_may_have_an_exponent_without_a_point(tmp_path: Path) -> None:
    for number in ("1e-3", "1E-03", "0.1e-2", "1.e-3", "+10e-4"):
        plan = plan_from(tmp_path, MERGEKIT.replace("weight: 1.0", f"weight: {number}"))
        assert plan.models[0].weight.at("layers.0.mlp.weight", 0.0) == 0.001
    assert plan_from(tmp_path, MERGEKIT.replace("model: A.safetensors", "model: '1e-3'")).models[0].model == Path(
        "1e-3"
    )


def test_the_plan_on_the_card_is_the_plan(tmp_path: Path) -> None:
    plans = [
        plan_from(tmp_path, MERGEKIT),
        pair(tmp_path, per="layer", out_dtype="float16", base_model=tmp_path / "A", shard_size=1000),
        MergePlan(("A", "B"), "slerp", t=[0.0, 1.0], pad_vocabulary=True),  # type: ignore[arg-type]
        MergePlan(("A",), "task_arithmetic", base_model="B", scale=0.5, rank=3),  # type: ignore[arg-type]
    ]
    for plan in plans:
        assert plan_from(tmp_path, "\n".join(yaml_lines(plan))) == plan


def test_our_words_stand_beside_each_model_or_in_its_parameters(tmp_path: Path) -> None:
    text = "models: [{model: A, fisher: FA, mean: M}, {model: B, parameters: {fisher: FB, gradient: G}}]\nper: leaf\n"
    plan = plan_from(tmp_path, text)
    assert (plan.merge_method, plan.per) == ("became", "leaf")
    assert (plan.models[0].fisher, plan.models[0].mean) == (Path("FA"), Path("M"))
    assert (plan.models[1].fisher, plan.models[1].gradient) == (Path("FB"), Path("G"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MERGEKIT + "slices: []\n", "'slices', which is not known"),
        (MERGEKIT + "chat_template: auto\n", "'chat_template', which is not known"),
        (MERGEKIT.replace("normalize: true", "int8_mask: true"), "parameters of .* has 'int8_mask'"),
        (MERGEKIT.replace("normalize: true", "t: 0.5"), "'t', of which linear makes no use"),
        (MERGEKIT.replace("normalize: true", "lambda: 0.5"), "'lambda', of which linear makes no use"),
        (MERGEKIT.replace(": linear", ": task_arithmetic"), "'normalize', of which task_arithmetic makes no use"),
        (MERGEKIT.replace("weight: 1.0", "density: 0.5"), "'density', which is not known"),
        (MERGEKIT.replace("bfloat16", "int4"), "out_dtype is 'int4', which is no known dtype"),
        (MERGEKIT.replace("normalize: true", "normalize: 1"), "'normalize' with a value that is no bool"),
        (MERGEKIT + "tokenizer_source: union\n", "tokenizer_source other than 'base'"),
        (
            "models:\n- model: a\n  parameters: {density: 0.5}\nmerge_method: ties\n",
            "merge_method 'ties' is not known; known are became",
        ),
        (MERGEKIT + "merge_method: ties\n", "'merge_method' twice"),
        (MERGEKIT.replace("1.0\n", "high\n"), "weight of A.safetensors is no number"),
        (MERGEKIT.replace("weight: 1.0", "weight: .nan"), "not finite"),
        (MERGEKIT.replace("weight: 1.0", "weight: true"), "is no number"),
        (MERGEKIT.replace("weight: 1.0", "weight: []"), "is no number"),
        (MERGEKIT.replace("filter: mlp", "filter: 3"), "needs a 'value', and a 'filter'"),
        ("models: [A]\n", "the plan has 1 models"),
        ("models: {}\n", "no list of 'models'"),
        ("[1, 2]\n", "is not a mapping"),
        ("", "is not a mapping"),
        ("a: [\n", "is no valid YAML in line"),
        ("a: &x [1]\nb: *x\n", "refers to a part of itself"),
        ("a: !!python/object/apply:os.system ['true']\n", "is no valid YAML"),
        ("? [1]\n: 2\n", "is no valid YAML"),
        ("[" * 5000, "nests brackets more than 20 deep"),
        ("a: 2020-99-99\n", "is no valid YAML|not known"),
        ("models: [{model: 3}, B]\n", "has no 'model'"),
        ('models: ["A", "B\\0"]\n', "is the path of a file"),
        (MERGEKIT.replace("linear", "3"), "'merge_method' with a value that is no str"),
        ("models: [A, B]\nper: row\n", "no coefficient per 'row'"),
        ("models: [A, B]\nper: leaf\nparameters: {per: layer}\n", "has 'per' twice, also among its parameters"),
        ("models: [{model: A, weight: 1, parameters: {weight: 2}}, B]\n", "^A in .* has 'weight' twice; leave one out"),
        ("models: [A, B]\nrank: 0\n", "the rank is 0"),
        ("models: [A, B]\nshard_size: 5GB\n", "'shard_size' with a value that is no int"),
    ],
)
def test_what_a_plan_cannot_say_is_refused_by_its_word(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BecameError, match=message) as error:
        plan_from(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_method": "ties"}, "merge_method 'ties' is not known; known are became, linear"),
        ({"merge_method": "linear"}, "linear makes no use of the fisher"),
        ({"merge_method": "linear", "per": "layer"}, "'per: layer' is for became"),
        ({"merge_method": "task_arithmetic"}, "give base_model"),
    ],
)
def test_a_rule_says_what_it_cannot_use(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        merge_checkpoints(pair(tmp_path, **options), tmp_path / "out")


def test_a_rule_asks_for_what_it_needs(tmp_path: Path) -> None:
    models = [saved(tmp_path, name, arrays(k)) for k, name in enumerate("ABC")]
    cases: list[tuple[Any, str]] = [
        (MergePlan(tuple(map(PlannedModel, models))), "became needs a Fisher file for each model, and .*A"),
        (MergePlan(tuple(map(PlannedModel, models)), "slerp"), "slerp is between two models, not 3"),
        (MergePlan((PlannedModel(models[0]), PlannedModel(models[1], 0.3)), "slerp"), "slerp makes no use of weights"),
        (MergePlan(tuple(map(PlannedModel, models[:2])), "slerp", models[2]), "and .*C.safetensors is none of the two"),
        (MergePlan((PlannedModel(models[0], 1.0), PlannedModel(models[1], -1.0)), "linear"), "sum to 0"),
        (MergePlan((PlannedModel(models[0], [{"filter": "x", "value": 1}]), PlannedModel(models[1])), "linear"),
         "no filter fits the tensor"),
    ]  # fmt: skip
    for plan, message in cases:
        with pytest.raises(BecameError, match=message):
            merge_checkpoints(plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_method": "fisher"}, "weight of 'model.layers.0.mlp.weight' is 0 for all models, so that none counts"),
        ({"merge_method": "imm-mode"}, "weight of 'model.layers.0.mlp.weight' is 0 for all models"),
        ({"per": "weight"}, "weight of 'model.layers.0.mlp.weight' is 0 for all models"),
        ({"merge_method": "linear"}, "the weights of 'model.layers.0.mlp.weight' sum to 0; they cannot be normalised"),
    ],
)
def test_weights_that_are_0_for_one_tensor_are_refused_before_any_work(
    tmp_path: Path, options: Any, message: str
) -> None:
    plan, weight = pair(tmp_path, **options), [{"filter": "layers.0", "value": 0.0}, {"value": 1.0}]
    fishers = [None if options.get("merge_method") == "linear" else model.fisher for model in plan.models]
    models = tuple(PlannedModel(m.model, weight, fisher=f) for m, f in zip(plan.models, fishers, strict=True))
    with pytest.raises(BecameError, match=message):
        preview(plan.replaced(models=models))
    refused(plan.replaced(models=models), tmp_path / "out", message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_method": "fisher"}, "^fisher makes no use of the base_model .*C.safetensors; leave it out"),
        ({"merge_method": "imm-mode"}, "^imm-mode makes no use of the base_model"),
        ({"merge_method": "regmean"}, "^regmean makes no use of the base_model"),
        ({"per": "weight"}, "^became per weight makes no use of the base_model"),
    ],
)
def test_a_base_model_that_would_do_nothing_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    plan = pair(tmp_path, base_model=saved(tmp_path, "C", arrays(2)), **options)
    for models in (plan.models, plan.models[:1]):
        refused(plan.replaced(models=models), tmp_path / "out", message)


def test_a_base_model_that_gives_the_tokenizer_alone_is_no_second_model(tmp_path: Path) -> None:
    first, second = (saved(tmp_path, name, arrays(k)) for k, name in enumerate("AB"))
    refused(MergePlan((PlannedModel(first),), "linear", second), tmp_path / "out", "the tokenizer alone from the base")
    merge_checkpoints(MergePlan((PlannedModel(first), PlannedModel(first)), "linear", second), tmp_path / "out")
    for name, value in merged(tmp_path / "out").items():
        assert_array_equal(value, arrays(0)[name])


def test_mergekits_slerp_begins_at_the_base_model(tmp_path: Path) -> None:
    first, second = (PlannedModel(saved(tmp_path, name, arrays(k))) for k, name in enumerate("AB"))
    merge_checkpoints(MergePlan((first, second), "slerp", t=0.3), tmp_path / "out")
    merge_checkpoints(MergePlan((second, first), "slerp", first.model, t=0.3), tmp_path / "based")
    for name, value in merged(tmp_path / "out").items():
        assert_allclose(merged(tmp_path / "based")[name], value, rtol=1e-6, atol=1e-7)


def test_mergekits_task_arithmetic_may_say_that_it_does_not_normalise(tmp_path: Path) -> None:
    text = MERGEKIT.replace(": linear", ": task_arithmetic").replace("normalize: true", "normalize: false, lambda: 0.5")
    plan = plan_from(tmp_path, text.replace("parameters:\n  normalize: false, lambda: 0.5",
                                            "parameters: {normalize: false, lambda: 0.5}"))  # fmt: skip
    assert plan.scale.at("w", 0.0) == 0.5


def test_paths_are_those_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    merge_checkpoints(plan_from(tmp_path, MERGEKIT), tmp_path / "out")
    assert all(value.dtype.name == "bfloat16" for value in merged(tmp_path / "out").values())


def test_the_methods_of_plans_are_the_rules() -> None:
    assert set(METHODS) == set(RULES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "AB"}, "^models is 'AB'; give a tuple of them, each a PlannedModel or a path"),
        ({"models": None}, "^models is NoneType; give a tuple"),
        ({"models": ("A", None)}, "'model' is the path of a file or a folder, not 'NoneType'"),
        ({"normalize": "no"}, "^normalize is 'no'; give True or False"),
        ({"pad_vocabulary": 1}, "^pad_vocabulary is 1; give True or False"),
        ({"rank": 2.5}, "^the rank is 2.5; give a whole number of at least 1"),
        ({"rank": True}, "^the rank is True; give a whole number"),
        ({"shard_size": "5GB"}, "^the shard size in bytes is '5GB'; give a whole number"),
    ],
)
def test_a_plan_with_a_value_of_another_type_is_refused_in_a_sentence(options: Any, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        MergePlan(**{"models": ("A", "B"), **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": "plan.yaml"}, "^the plan is of type str; give a MergePlan, as read_plan returns one"),
        ({"memory": "1GB"}, "^memory is of type str; give a number of bytes"),
        ({"memory": None}, "^memory is of type NoneType"),
        ({"workers": 0}, "^the number of workers is 0; give a whole number of at least 1"),
        ({"workers": "2"}, "^the number of workers is '2'"),
        ({"scheduler": 3}, "^scheduler is the address of a Dask scheduler as a text"),
        ({"progress": 3}, "and progress a function"),
        ({"out": None}, "^'out' is the path of a file or a folder"),
    ],
)
def test_an_argument_of_another_type_is_refused_in_a_sentence(tmp_path: Path, arguments: Any, message: str) -> None:
    given = {"plan": pair(tmp_path), "out": tmp_path / "out", **arguments}
    with pytest.raises(BecameError, match=message):
        merge_checkpoints(**given)
    if not {"scheduler", "progress", "out"} & arguments.keys():
        del given["out"]
        with pytest.raises(BecameError, match=message):
            preview(**given)


def test_a_path_may_be_a_text(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(MERGEKIT, encoding="utf-8")
    assert read_plan(str(tmp_path / "plan.yaml")).merge_method == "linear"
    words = {"became.fisher": "1", "kind": "empirical", "unit": "sum", "per": "sample", "samples": "4"}
    parts = [str(saved(tmp_path, name, arrays(k, positive=True), words)) for k, name in enumerate("XY")]
    assert open_checkpoint(parts[0]).tensors.keys() == arrays(0).keys()
    add_fisher_files(parts, str(tmp_path / "sum.safetensors"))
    with pytest.raises(BecameError, match="give a list of their paths, not one str"):
        add_fisher_files(parts[0], tmp_path / "other.safetensors")
    for function in (open_checkpoint, read_plan):
        with pytest.raises(BecameError, match="is the path of a file or a folder, not '3'"):
            function(3)  # type: ignore[arg-type]
