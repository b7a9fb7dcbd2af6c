"""A merge of LoRA adapters is a merge of the differences that they make, never of their factors."""

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints, open_checkpoint, preview
from adapters.checkpoints.inspection import inspect_checkpoints
from adapters.checkpoints.lora import adapter_of, combined, compressed
from adapters.checkpoints.opening import open_job
from became_core import BecameError, optimal_alpha
from tests.checkpoints.models import Arrays, arrays, saved

WIDE, TALL = "model.layers.0.q_proj", "model.layers.1.v_proj"
SIZES = {WIDE: (5, 9), TALL: (8, 4)}


def adapter(folder: Path, name: str, seed: int, *, rank: int = 2, modules: Any = SIZES, **config: Any) -> Path:
    generator, tensors = np.random.default_rng(seed), {}
    for module, (d_out, d_in) in modules.items():
        for suffix, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            values = generator.normal(size=shape).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_{suffix}.weight"] = values
    place = folder / name
    place.mkdir()
    save_file(tensors, place / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (place / "adapter_config.json").write_text(json.dumps(words | config), encoding="utf-8")
    return place


def differences(folder: Path) -> Arrays:
    """What an adapter adds to each module's weight, in double precision, as peft defines it."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    result = {}
    for name, down in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = config.get("rank_pattern", {}).get(f"^{module}", config["r"])
            alpha = config.get("alpha_pattern", {}).get(f"^{module}", config["lora_alpha"])
            scale = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
            up = tensors[name.replace("lora_A", "lora_B")].astype(float)
            assert down.shape[0] == rank
            result[module] = scale * up @ down.astype(float)
    return result


def mixed(parts: Mapping[Path, float]) -> Arrays:
    total: Arrays = {}
    for folder, share in parts.items():
        for module, difference in differences(folder).items():
            total[module] = total.get(module, np.zeros_like(difference)) + share * difference
    return total


def test_a_weighted_mean_is_exact_with_the_sum_of_the_ranks(tmp_path: Path) -> None:
    first = adapter(tmp_path, "A", 0, rank=2)
    second = adapter(tmp_path, "B", 1, rank=3, use_rslora=True, lora_alpha=5)
    merge_checkpoints(MergePlan((PlannedModel(first, 1.0), PlannedModel(second, 3.0)), "linear"), tmp_path / "out")
    expected = mixed({first: 0.25, second: 0.75})
    for module, difference in differences(tmp_path / "out").items():
        assert_allclose(difference, expected[module], atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    # What it would be to average the factors is another model.
    halves = [load_file(folder / "adapter_model.safetensors") for folder in (first, adapter(tmp_path, "C", 2))]
    names = [f"base_model.model.{WIDE}.lora_{suffix}.weight" for suffix in "AB"]
    down, up = ((halves[0][name] + halves[1][name]) / 2 for name in names)
    true = mixed({first: 0.5, tmp_path / "C": 0.5})[WIDE]
    assert np.linalg.norm(4 * up @ down - true) > 0.5 * np.linalg.norm(true)


@pytest.mark.parametrize("rule", ["slerp", "linear"])
def test_a_rule_that_knows_no_base_model_adds_none_of_it(tmp_path: Path, rule: Literal["slerp", "linear"]) -> None:
    first, second = adapter(tmp_path, "A", 0), adapter(tmp_path, "B", 1)
    weights = (0.5, 0.2) if rule == "linear" else (1.0, 1.0)
    models = PlannedModel(first, weights[0]), PlannedModel(second, weights[1])
    for base in (None, first):
        plan = MergePlan(models, rule, base_model=base, normalize=rule != "linear")
        merge_checkpoints(plan, tmp_path / f"out-{base is None}")
    expected = mixed({first: 0.5, second: 0.2}) if rule == "linear" else differences(tmp_path / "out-True")
    for module, difference in differences(tmp_path / "out-False").items():
        assert_allclose(difference, expected[module], atol=1e-5)


def test_gram_matrices_of_adapters_are_refused(tmp_path: Path) -> None:
    gram = saved(tmp_path, "G", {f"{WIDE}.weight": np.eye(9)})
    models = tuple(PlannedModel(adapter(tmp_path, name, k), gram=gram) for k, name in enumerate("AB"))
    with pytest.raises(BecameError, match="regmean solves for whole weights, and a merge of LoRA adapters has"):
        merge_checkpoints(MergePlan(models, "regmean"), tmp_path / "out")


def test_a_module_that_one_adapter_lacks_is_not_changed_by_it(tmp_path: Path) -> None:
    first = adapter(tmp_path, "A", 0, modules={WIDE: SIZES[WIDE]}, target_modules=["q_proj"])
    second = adapter(tmp_path, "B", 1, rank=3)
    merge_checkpoints(MergePlan((PlannedModel(first), PlannedModel(second)), "linear"), tmp_path / "out")
    expected, found = mixed({first: 0.5, second: 0.5}), differences(tmp_path / "out")
    assert found.keys() == expected.keys()
    for module, difference in found.items():
        assert_allclose(difference, expected[module], atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(SIZES)


@pytest.mark.parametrize(
    "words",
    [
        ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
        ({"exclude_modules": ["v_proj"]}, {"exclude_modules": ["q_proj"]}),
    ],
)
def test_the_merged_adapter_changes_the_modules_of_all(tmp_path: Path, words: Any) -> None:
    places = [
        adapter(tmp_path, name, k, modules={module: SIZES[module]}, **words[k])
        for k, (name, module) in enumerate((("A", WIDE), ("B", TALL)))
    ]
    merge_checkpoints(MergePlan(tuple(map(PlannedModel, places)), "linear"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(SIZES)
    assert not any(config.get(word) for word in ("layers_to_transform", "exclude_modules"))


def test_a_rank_is_that_of_one_module_although_another_name_ends_with_it(tmp_path: Path) -> None:
    modules = {"proj": (3, 4), "decoder.proj": (3, 4), "decoder.other": (3, 4)}
    first = adapter(tmp_path, "A", 0, modules=modules)
    second = adapter(tmp_path, "B", 1, modules={"proj": (3, 4)})
    merge_checkpoints(MergePlan((PlannedModel(first), PlannedModel(second)), "linear"), tmp_path / "out")
    found = adapter_of(open_checkpoint(tmp_path / "out")).modules
    assert {module: factors.rank for module, factors in found.items()} == {
        "proj": 4,
        "decoder.proj": 2,
        "decoder.other": 2,
    }
    assert {factors.scale for factors in found.values()} == {1.0}


def test_a_fisher_file_is_of_the_base_model_with_the_adapter_in_it(tmp_path: Path) -> None:
    first, second = adapter(tmp_path, "A", 0), adapter(tmp_path, "B", 1, base_model_name_or_path="other")
    words = {"became.fisher": "1", "kind": "empirical", "unit": "sum", "per": "sample"}
    shapes = {f"{module}.weight": size for module, size in SIZES.items()}
    models = tuple(
        PlannedModel(
            place, fisher=saved(tmp_path, f"F{k}", arrays(k, shapes, positive=True), {**words, "model": 32 * "0"})
        )
        for k, place in enumerate((first, second))
    )
    notes = " ".join(merge_checkpoints(MergePlan(models), tmp_path / "out").notes)
    assert "could not be checked" in notes
    assert "different base models: None, other" in notes


def test_alpha_is_that_of_the_differences(tmp_path: Path) -> None:
    first, second = adapter(tmp_path, "A", 0), adapter(tmp_path, "B", 1)
    shapes = {f"{module}.weight": size for module, size in SIZES.items()} | {"model.embed.weight": (3, 3)}
    fishers = [arrays(k, shapes, positive=True) for k in range(2)]
    models = tuple(
        PlannedModel(model, fisher=saved(tmp_path, f"F{k}", fishers[k])) for k, model in enumerate((first, second))
    )
    report = merge_checkpoints(MergePlan(models), tmp_path / "out")
    whole = [{f"{module}.weight": d for module, d in differences(folder).items()} for folder in (first, second)]
    curvatures = [{name: fisher[name].astype(float) for name in whole[0]} for fisher in fishers]
    assert report.alpha == pytest.approx(float(optimal_alpha(*whole, *curvatures)), rel=1e-5)
    assert isinstance(report.alpha, float)
    expected = mixed({first: 1 - report.alpha, second: report.alpha})
    for module, difference in differences(tmp_path / "out").items():
        assert_allclose(difference, expected[module], atol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_differences_that_are_read_in_several_blocks_are_the_same(
    tmp_path: Path, workers: int, transposed: bool
) -> None:
    modules = {WIDE: (900, 1000), TALL: (1000, 900)}  # four blocks each
    first, second = (
        adapter(tmp_path, name, k, modules=modules, fan_in_fan_out=transposed) for k, name in enumerate("AB")
    )
    shapes = {f"{module}.weight": size[::-1] if transposed else size for module, size in modules.items()}
    fishers = [arrays(k, shapes, positive=True) for k in range(2)]
    fishers[0][f"{WIDE}.weight"][500:] *= 20  # so that it matters which curvature a difference meets
    models = tuple(
        PlannedModel(model, fisher=saved(tmp_path, f"F{k}", fishers[k])) for k, model in enumerate((first, second))
    )
    whole = [
        {f"{module}.weight": d.T.copy() if transposed else d for module, d in differences(folder).items()}
        for folder in (first, second)
    ]
    report = merge_checkpoints(MergePlan(models), tmp_path / "out", workers=workers)
    curvatures = [{name: value.astype(float) for name, value in fisher.items()} for fisher in fishers]
    assert report.alpha == pytest.approx(float(optimal_alpha(*whole, *curvatures)), rel=1e-5)


def test_a_preview_says_what_is_read_of_adapters_and_memory_in_which_they_are_compressed(tmp_path: Path) -> None:
    modules = {WIDE: (4096, 64), TALL: (64, 64)}
    places = [adapter(tmp_path, name, k, rank=32, modules=modules) for k, name in enumerate("AB")]
    shapes = {f"{module}.weight": size for module, size in modules.items()}
    models = tuple(
        PlannedModel(place, fisher=saved(tmp_path, f"F{k}", arrays(k, shapes, positive=True)))
        for k, place in enumerate(places)
    )
    plan = MergePlan(models, rank=32)
    shown = preview(plan)
    report = merge_checkpoints(plan, tmp_path / "out")
    assert shown.bytes_to_read == report.bytes_read
    job = open_job(plan)
    tracemalloc.start()
    compressed(*combined(job.adapters, WIDE, (0.5, 0.5)), 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < job.bytes_beside < 3 * peak
    assert shown.memory > job.bytes_beside


def test_a_smaller_rank_is_the_best_one_and_its_error_is_reported(tmp_path: Path) -> None:
    first, second = adapter(tmp_path, "A", 0), adapter(tmp_path, "B", 1)
    plan = MergePlan((PlannedModel(first), PlannedModel(second)), "linear", rank=3)
    report = merge_checkpoints(plan, tmp_path / "out")
    expected = mixed({first: 0.5, second: 0.5})
    for module, difference in differences(tmp_path / "out").items():
        values = np.linalg.svd(expected[module], compute_uv=False)
        error = np.linalg.norm(difference - expected[module]) / np.linalg.norm(expected[module])
        assert error == pytest.approx(np.linalg.norm(values[3:]) / np.linalg.norm(values), rel=1e-4)
        assert report.errors[module] == pytest.approx(error, rel=1e-4)
    assert f"| `{WIDE}` | {report.errors[WIDE]:.4f} |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_transposed_weights_have_transposed_differences(tmp_path: Path) -> None:
    first = adapter(tmp_path, "A", 0, fan_in_fan_out=True)
    second = adapter(tmp_path, "B", 1, fan_in_fan_out=True)
    shapes = {f"{module}.weight": size[::-1] for module, size in SIZES.items()}
    fishers = [arrays(k, shapes, positive=True) for k in range(2)]
    models = tuple(
        PlannedModel(model, fisher=saved(tmp_path, f"F{k}", fishers[k])) for k, model in enumerate((first, second))
    )
    report = merge_checkpoints(MergePlan(models), tmp_path / "out")
    whole = [
        {f"{module}.weight": d.T.copy() for module, d in differences(folder).items()} for folder in (first, second)
    ]
    curvatures = [{name: value.astype(float) for name, value in fisher.items()} for fisher in fishers]
    assert report.alpha == pytest.approx(float(optimal_alpha(*whole, *curvatures)), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "biases"),
        ({"peft_type": "IA3"}, "'IA3' adapter"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication'"),
        ({"use_bdlora": {"blocks": 2}}, "'use_bdlora'"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
        ({"r": 4}, "not rank 4"),
        ({"r": 2.5}, "not rank 2.5"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"rank_pattern": {"(.+)+!": 3}}, "a rank_pattern with a repeated group"),
        ({"lora_alpha": "x"}, "no number"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, config: Any, message: str) -> None:
    first, second = adapter(tmp_path, "A", 0), adapter(tmp_path, "B", 1, **config)
    with pytest.raises(BecameError, match=message):
        merge_checkpoints(MergePlan((PlannedModel(first), PlannedModel(second)), "linear"), tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["A", "B"]


def test_an_adapter_and_a_whole_model_are_not_merged(tmp_path: Path) -> None:
    first, second = adapter(tmp_path, "A", 0), saved(tmp_path, "B", arrays(0))
    with pytest.raises(BecameError, match="A is a LoRA adapter and other models are not"):
        merge_checkpoints(MergePlan((PlannedModel(first), PlannedModel(second)), "linear"), tmp_path / "out")
    with pytest.raises(BecameError, match="a rank is for LoRA adapters"):
        merge_checkpoints(MergePlan((PlannedModel(second), PlannedModel(second)), "linear", rank=2), tmp_path / "out")


def test_a_tensor_that_is_no_factor_is_refused_by_name(tmp_path: Path) -> None:
    first, second = adapter(tmp_path, "A", 0), adapter(tmp_path, "B", 1)
    tensors = load_file(second / "adapter_model.safetensors")
    name = f"base_model.model.{WIDE}.lora_magnitude_vector"
    save_file(tensors | {name: np.ones(5, np.float32)}, second / "adapter_model.safetensors")
    with pytest.raises(BecameError, match=f"'{name}' of .* is no factor"):
        merge_checkpoints(MergePlan((PlannedModel(first), PlannedModel(second)), "linear"), tmp_path / "out")


@pytest.mark.parametrize("name", [f"{WIDE}.base_layer.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("both", [False, True])
def test_weights_of_the_base_that_peft_saves_too_are_kept_where_they_agree(
    tmp_path: Path, name: str, both: bool
) -> None:
    first, second = adapter(tmp_path, "A", 0), adapter(tmp_path, "B", 1)
    plan = MergePlan((PlannedModel(first), PlannedModel(second)), "linear")
    merge_checkpoints(plan, tmp_path / "plain")
    full, frozen = f"base_model.model.{name}", np.random.default_rng(2).normal(size=(600, 500)).astype(np.float32)
    for place in (first, second) if both else (second,):
        file = place / "adapter_model.safetensors"
        save_file(load_file(file) | {full: frozen}, file)
    merge_checkpoints(plan, tmp_path / "out")
    found, plain = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("out", "plain"))
    assert np.array_equal(found.pop(full), frozen)
    assert found.keys() == plain.keys()
    assert all(np.array_equal(value, plain[key]) for key, value in found.items())


def test_weights_of_the_base_that_differ_are_refused(tmp_path: Path) -> None:
    places = [adapter(tmp_path, name, k) for k, name in enumerate("AB")]
    name = f"base_model.model.{WIDE}.base_layer.weight"
    for k, place in enumerate(places):
        file = place / "adapter_model.safetensors"
        save_file(load_file(file) | {name: np.full((5, 9), k, np.float32)}, file)
    plan = MergePlan(tuple(map(PlannedModel, places)), "linear")
    message = (
        f"^'{name}' of .*B.* is a weight of the base model and differs from that of .*A.*; merge adapters of one base"
    )
    with pytest.raises(BecameError, match=message):
        merge_checkpoints(plan, tmp_path / "out")
    assert message[1:20] in inspect_checkpoints(places)[-1]


@pytest.mark.parametrize("suffix", ["A", "B"])
@pytest.mark.parametrize("way", ["exact", "rank", "became"])
def test_a_factor_that_is_not_finite_is_refused_by_its_name(tmp_path: Path, suffix: str, way: str) -> None:
    places = [adapter(tmp_path, name, k) for k, name in enumerate("AB")]
    file, name = places[1] / "adapter_model.safetensors", f"base_model.model.{TALL}.lora_{suffix}.weight"
    tensors = load_file(file)
    tensors[name][1, 1] = np.nan
    save_file(tensors, file)
    fisher = saved(tmp_path, "F", {f"{module}.weight": np.ones(size) for module, size in SIZES.items()})
    given = {"fisher": fisher} if way == "became" else {}
    models = tuple(PlannedModel(place, **given) for place in places)
    plan = MergePlan(models, "became" if way == "became" else "linear", rank=1 if way == "rank" else None)
    with pytest.raises(BecameError, match=f"^'{name}' of .*B.* has an entry that is infinite or not a number"):
        merge_checkpoints(plan, tmp_path / "out")


def test_inspect_says_what_adapters_are_and_how_they_merge(tmp_path: Path) -> None:
    first, second = adapter(tmp_path, "A", 0), adapter(tmp_path, "B", 1, rank=3)
    lines = inspect_checkpoints([first, second])
    assert f"{first}: LoRA adapter" in lines
    assert "  2 modules of rank 3" in lines
    assert "They can be merged: 2 tensors, and 0 that are equal or copied." in lines
    assert "  With a Fisher file for each: became. `became fisher` makes them." in lines
    whole = saved(tmp_path, "C", arrays(0))
    assert inspect_checkpoints([first, whole])[-1].startswith("They cannot be merged: LoRA adapters and whole models")
