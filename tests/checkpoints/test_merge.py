"""A streamed merge is what the core computes in memory, and what the oracle computes in double precision."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints, preview
from adapters.checkpoints.plan import group_of_tensor
from adapters.checkpoints.rules import GroupwiseMinimum
from adapters.checkpoints.tensors import SLAB
from became_core import BecameError, merge, optimal_alpha
from became_core.laplace import Became, Diagonal, DiagonalFisher, LaplacePosterior, combine
from reference.formulas import alpha_star
from reference.quadratics import height, minimum_in_box
from tests.checkpoints.models import SHAPES, Arrays, arrays, bf16, contents, merged, pair, saved


def alike(values: Arrays, expected: Any, tolerance: float = 2e-6) -> None:
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert_allclose(values[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("per", ["model", "leaf"])
def test_alpha_and_weights_are_those_of_the_core_in_memory(tmp_path: Path, per: Any) -> None:
    first, second = arrays(0), arrays(1)
    alpha = optimal_alpha(first, second, arrays(10, positive=True), arrays(11, positive=True), per=per)
    report = merge_checkpoints(pair(tmp_path, per=per), tmp_path / "out")
    found: Any = report.alpha if per == "leaf" else {"": report.alpha}
    for name, value in (alpha if per == "leaf" else {"": alpha}).items():
        assert found[name] == pytest.approx(float(value), rel=1e-5)
    alike(merged(tmp_path / "out"), merge(first, second, alpha))


def test_alpha_and_the_prediction_are_those_of_the_oracle(tmp_path: Path) -> None:
    report = merge_checkpoints(pair(tmp_path), tmp_path / "out")
    first, second, old, new = (
        np.concatenate([value.reshape(-1) for value in values.values()]).astype(np.float64)
        for values in (arrays(0), arrays(1), arrays(10, positive=True), arrays(11, positive=True))
    )
    assert report.alpha == pytest.approx(
        alpha_star(first, second, np.diag(old), np.diag(new), 0 * first, first), rel=1e-6
    )
    delta = second - first
    slope, curvature = np.asarray([-(delta @ (new * delta))]), np.asarray([[delta @ ((old + new) * delta)]])
    assert report.gain == pytest.approx(-minimum_in_box(slope, curvature), rel=1e-6)
    assert report.slopes == pytest.approx((slope[0], slope[0] + curvature[0, 0]), rel=1e-6)
    assert report.convex
    assert report.gain == pytest.approx(-height(slope, curvature, np.asarray([report.alpha])), rel=1e-6)


@pytest.mark.parametrize(("size", "passes"), [(1.0, 1), (0.0, 1), (1e-36, 2)])
def test_a_slab_is_added_up_in_double_precision_where_single_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, passes: int
) -> None:
    plan = pair(tmp_path)
    for k, name in enumerate("AB"):
        fisher = {name: np.asarray(value * np.float32(size)) for name, value in arrays(10 + k, positive=True).items()}
        fisher["lm_head.weight"] = arrays(10 + k, positive=True)["lm_head.weight"]  # so that no file is all zero
        saved(tmp_path, f"F{name}", fisher)
    added = list[str]()
    between = GroupwiseMinimum._between

    def counted(rule: Any, slab: Any, *rest: Any) -> Any:
        added.append(slab.name)
        return between(rule, slab, *rest)

    monkeypatch.setattr(GroupwiseMinimum, "_between", counted)
    report = merge_checkpoints(plan.replaced(per="leaf"), tmp_path / "out")
    assert added.count("model.layers.0.mlp.weight") == passes
    assert isinstance(report.alpha, dict)
    parts = [
        values["model.layers.0.mlp.weight"].astype(float)
        for values in (arrays(10, positive=True), arrays(11, positive=True))
    ]
    squares = (arrays(1)["model.layers.0.mlp.weight"].astype(float) - arrays(0)["model.layers.0.mlp.weight"]) ** 2
    old, new = ((part * squares).sum() for part in parts)
    assert report.alpha["model.layers.0.mlp.weight"] == pytest.approx(new / (old + new) if size else 0.0, rel=1e-5)


def test_layers_are_found_by_name(tmp_path: Path) -> None:
    report = merge_checkpoints(pair(tmp_path, per="layer"), tmp_path / "out")
    assert isinstance(report.alpha, dict)
    assert list(report.alpha) == ["lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    names = [name for name in SHAPES if name.startswith("model.layers.1.")]
    parts = [
        {name: values[name] for name in names}
        for values in (arrays(0), arrays(1), arrays(10, positive=True), arrays(11, positive=True))
    ]
    alpha = float(optimal_alpha(*parts))
    assert report.alpha["model.layers.1"] == pytest.approx(alpha, rel=1e-5)
    alike({name: merged(tmp_path / "out")[name] for name in names}, merge(parts[0], parts[1], alpha))
    assert (tmp_path / "out" / "alpha.svg").read_text(encoding="utf-8").count("<rect") == 6


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.17.mlp.up_proj.weight", "model.layers.17"),
        ("transformer.h.0.attn.c_attn.bias", "transformer.h.0"),
        ("layer3.1.conv2.weight", "layer3.1"),
        ("0.weight", "0"),
        ("fc.weight", "fc"),
        ("scale", "scale"),
    ],
)
def test_a_layer_is_what_stands_before_and_at_the_first_number(name: str, layer: str) -> None:
    assert group_of_tensor(name, "layer") == layer


def test_a_coefficient_for_each_weight_is_the_mode_of_the_posteriors(tmp_path: Path) -> None:
    merge_checkpoints(pair(tmp_path, per="weight"), tmp_path / "out")
    old, new = arrays(10, positive=True), arrays(11, positive=True)
    expected = {
        name: (old[name] * value + new[name] * arrays(1)[name]) / (old[name] + new[name])
        for name, value in arrays(0).items()
    }
    alike(merged(tmp_path / "out"), expected)


@pytest.mark.parametrize(("method", "weights"), [("fisher", (1.0, 3.0)), ("imm-mode", (0.25, 0.75))])
def test_a_fisher_mean_weighs_models(tmp_path: Path, method: str, weights: tuple[float, float]) -> None:
    plan = pair(tmp_path, merge_method=method)
    models = tuple(
        PlannedModel(model.model, weight, model.fisher) for model, weight in zip(plan.models, weights, strict=True)
    )
    merge_checkpoints(plan.replaced(models=models), tmp_path / "out")
    old, new = arrays(10, positive=True), arrays(11, positive=True)
    expected = {
        name: (weights[0] * old[name] * value + weights[1] * new[name] * arrays(1)[name])
        / (weights[0] * old[name] + weights[1] * new[name])
        for name, value in arrays(0).items()
    }
    alike(merged(tmp_path / "out"), expected)


def test_several_models_are_merged_on_the_simplex_as_the_core_does(tmp_path: Path) -> None:
    models = tuple(
        PlannedModel(
            saved(tmp_path, f"M{k}", arrays(k)), fisher=saved(tmp_path, f"F{k}", arrays(20 + k, positive=True))
        )
        for k in range(3)
    )
    report = merge_checkpoints(MergePlan(models), tmp_path / "out")
    losses = [LaplacePosterior(arrays(k), Diagonal(arrays(20 + k, positive=True))) for k in range(3)]
    expected = Became(DiagonalFisher()).merge([arrays(k) for k in range(3)], losses)
    assert_allclose(report.coefficients[""], np.asarray(expected.alpha), rtol=1e-4)
    assert sum(report.coefficients[""]) == pytest.approx(1.0)
    alike(merged(tmp_path / "out"), expected.theta, 1e-4)


def test_with_a_base_model_differences_from_it_are_merged(tmp_path: Path) -> None:
    base = saved(tmp_path, "base", arrays(7))
    report = merge_checkpoints(pair(tmp_path, base_model=base), tmp_path / "out")
    flat = [np.concatenate([v.reshape(-1) for v in values.values()]).astype(np.float64) for values in
            (arrays(7), arrays(0), arrays(1), arrays(10, positive=True), arrays(11, positive=True))]  # fmt: skip
    origin, ways = flat[0], [flat[1] - flat[0], flat[2] - flat[0]]

    def loss(a: Any) -> float:
        theta = origin + a[0] * ways[0] + a[1] * ways[1]
        return float(sum(0.5 * (f * (theta - m) ** 2).sum() for m, f in zip(flat[1:3], flat[3:], strict=True)))

    best = report.coefficients[""][1:]
    grid = np.linspace(0, 1, 41)
    assert loss(best) <= min(loss((a, b)) for a in grid for b in grid) + 1e-9
    assert report.gain == pytest.approx(loss((0, 0)) - loss(best), rel=1e-6)
    alike(merged(tmp_path / "out"), combine([arrays(7), arrays(0), arrays(1)], list(report.coefficients[""])), 1e-5)


def test_gradient_and_mean_enter_as_in_the_core(tmp_path: Path) -> None:
    plan, gradient, mean = pair(tmp_path), arrays(30), arrays(31)
    first, second = plan.models
    first = PlannedModel(first.model, fisher=first.fisher, mean=saved(tmp_path, "mean", mean))
    second = PlannedModel(second.model, fisher=second.fisher, gradient=saved(tmp_path, "gradient", gradient))
    report = merge_checkpoints(plan.replaced(models=(first, second)), tmp_path / "out")
    alpha = optimal_alpha(
        arrays(0), arrays(1), arrays(10, positive=True), arrays(11, positive=True), gradient=gradient, mean=mean
    )
    assert report.alpha == pytest.approx(float(alpha), rel=1e-5)
    assert report.alpha != pytest.approx(float(optimal_alpha(arrays(0), arrays(1), arrays(10, positive=True),
                                                             arrays(11, positive=True))), rel=1e-2)  # fmt: skip


def test_linear_spreads_weights_over_depth_and_by_name(tmp_path: Path) -> None:
    files = [saved(tmp_path, name, arrays(k)) for k, name in enumerate("AB")]
    weight = [{"filter": "bias", "value": 0.0}, {"value": [0.0, 1.0]}]
    plan = MergePlan((PlannedModel(files[0], 1.0), PlannedModel(files[1], weight)), "linear")
    merge_checkpoints(plan, tmp_path / "out")
    out, first, second = merged(tmp_path / "out"), arrays(0), arrays(1)
    assert_array_equal(out["model.layers.0.mlp.weight"], first["model.layers.0.mlp.weight"])
    assert_array_equal(out["model.layers.1.mlp.bias"], first["model.layers.1.mlp.bias"])
    half = (first["model.layers.1.mlp.weight"] + second["model.layers.1.mlp.weight"]) / 2
    assert_allclose(out["model.layers.1.mlp.weight"], half, rtol=1e-5)


def test_linear_sums_without_normalising_if_asked(tmp_path: Path) -> None:
    models = tuple(PlannedModel(saved(tmp_path, f"M{k}", arrays(k)), 0.75) for k in range(3))
    merge_checkpoints(MergePlan(models, "linear", normalize=False), tmp_path / "out")
    alike(merged(tmp_path / "out"), {n: 0.75 * (v + arrays(1)[n] + arrays(2)[n]) for n, v in arrays(0).items()})


def test_task_arithmetic_adds_scaled_differences(tmp_path: Path) -> None:
    base = saved(tmp_path, "base", arrays(7))
    models = (PlannedModel(saved(tmp_path, "A", arrays(0)), 0.5), PlannedModel(saved(tmp_path, "B", arrays(1)), 2.0))
    merge_checkpoints(MergePlan(models, "task_arithmetic", base, scale=0.3), tmp_path / "out")
    expected = {
        name: value + 0.3 * (0.5 * (arrays(0)[name] - value) + 2.0 * (arrays(1)[name] - value))
        for name, value in arrays(7).items()
    }
    alike(merged(tmp_path / "out"), expected, 1e-5)


@pytest.mark.parametrize("rule", ["task_arithmetic", "linear", "slerp", "became"])
def test_a_variance_is_averaged_where_weights_leave_the_models_behind(tmp_path: Path, rule: str) -> None:
    name, other = "bn.running_var", "w"
    values = {"base": (8.0, [0.0, 0.0]), "A": (1.0, [1.0, 0.0]), "B": (3.0, [0.0, 1.0])}
    files = {
        key: saved(tmp_path, key, {name: np.full(3, variance), other: np.asarray(weights)})
        for key, (variance, weights) in values.items()
    }
    # Each loss knows the weight alone that its model moved: became takes both differences whole, the base -1 times.
    fishers = [saved(tmp_path, f"F{k}", {other: np.eye(2)[k]}) for k in range(2)] if rule == "became" else [None, None]
    weights = {"task_arithmetic": (1.0, 3.0), "linear": (-1.0, 0.5)}.get(rule, (1.0, 1.0))
    models = tuple(PlannedModel(files["AB"[k]], weights[k], fisher=fishers[k]) for k in range(2))
    by_rule: dict[str, Any] = {"linear": {"normalize": False}, "slerp": {"t": 1.5}}
    options = by_rule.get(rule, {"base_model": files["base"]})
    merge_checkpoints(MergePlan(models, rule, **options), tmp_path / "out")
    # By hand: shares below 0 count as 0, and the others are divided by their sum.
    expected = {"task_arithmetic": (1 + 3 * 3) / 4, "linear": 3.0, "slerp": 3.0, "became": 2.0}[rule]
    assert_allclose(merged(tmp_path / "out")[name], expected, rtol=1e-12)


def test_slerp_follows_the_arc_tensor_by_tensor(tmp_path: Path) -> None:
    models = (PlannedModel(saved(tmp_path, "A", arrays(0))), PlannedModel(saved(tmp_path, "B", arrays(1))))
    merge_checkpoints(MergePlan(models, "slerp", t=0.3), tmp_path / "out")
    name = "model.layers.0.mlp.weight"
    first, second = arrays(0)[name].astype(float), arrays(1)[name].astype(float)
    angle = np.arccos((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))
    expected = (np.sin(0.7 * angle) * first + np.sin(0.3 * angle) * second) / np.sin(angle)
    assert_allclose(merged(tmp_path / "out")[name], expected, rtol=1e-5)


def test_arithmetic_is_wide_whatever_is_stored(tmp_path: Path) -> None:  # mergekit 316, 347, 604
    # In bfloat16 1 + 2^-9 is 1, so that a mean in bfloat16 arithmetic of 1 and 1 + 2^-7 could be either neighbour.
    plan = pair(tmp_path, dtype=ml_dtypes.bfloat16, merge_method="became")
    merge_checkpoints(plan.replaced(out_dtype="float32"), tmp_path / "wide")
    merge_checkpoints(plan, tmp_path / "narrow")
    first = {name: value.astype(np.float32) for name, value in bf16(arrays(0)).items()}
    second = {name: value.astype(np.float32) for name, value in bf16(arrays(1)).items()}
    alpha = optimal_alpha(first, second, arrays(10, positive=True), arrays(11, positive=True))
    alike(merged(tmp_path / "wide"), merge(first, second, alpha))
    for name, value in merged(tmp_path / "wide").items():
        assert value.dtype == np.float32
        assert_array_equal(load_file(tmp_path / "narrow" / "model.safetensors")[name], value.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("word", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float64"])
def test_what_is_written_is_the_nearest_of_the_dtype(tmp_path: Path, word: str) -> None:
    plan = pair(tmp_path)
    merge_checkpoints(plan, tmp_path / "wide")
    report = merge_checkpoints(plan.replaced(out_dtype=word), tmp_path / "out")
    dtype = np.dtype(getattr(ml_dtypes, word, None) or word)
    for name, value in merged(tmp_path / "wide").items():
        stored = open_tensor(tmp_path / "out", name)
        assert stored.dtype == dtype
        if word == "float64":
            assert_allclose(stored, value, rtol=1e-6)
        else:
            assert_array_equal(stored, value.astype(dtype))
    assert report.bytes_written == (tmp_path / "out" / "model.safetensors").stat().st_size


def open_tensor(folder: Path, name: str) -> Any:
    from adapters.checkpoints import open_checkpoint

    return open_checkpoint(folder).tensors[name].whole()


def test_what_a_dtype_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    files = [saved(tmp_path, name, {"w": np.asarray([1.0, 70_000.0], np.float32)}) for name in "AB"]
    plan = MergePlan(tuple(map(PlannedModel, files)), "linear", out_dtype="float16")
    with pytest.raises(BecameError, match=r"'w' has an entry 7e\+04, which F16 cannot hold"):
        merge_checkpoints(plan, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["A.safetensors", "B.safetensors"]


def test_the_result_does_not_depend_on_memory_threads_and_shards(tmp_path: Path) -> None:
    shapes = {"a.weight": (3, SLAB // 2 + 7), "b.weight": (SLAB + 1,), "c.weight": (5,)}
    models = []
    for k, name in enumerate("AB"):
        fisher = saved(tmp_path, f"F{name}", arrays(10 + k, shapes, positive=True))
        models.append(PlannedModel(saved(tmp_path, name, arrays(k, shapes)), fisher=fisher))
    plan = MergePlan(tuple(models))
    one = merge_checkpoints(plan, tmp_path / "one", workers=1)
    many = merge_checkpoints(plan, tmp_path / "many", workers=4, memory=2**30)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert one.digests == many.digests
    sharded = merge_checkpoints(plan.replaced(shard_size=2 * SLAB * 4), tmp_path / "sharded")
    assert sharded.files == [f"model-{k + 1:05d}-of-00002.safetensors" for k in range(2)]
    assert sharded.alpha == one.alpha
    alike(merged(tmp_path / "sharded"), merged(tmp_path / "one"), 0)
    alpha = optimal_alpha(
        arrays(0, shapes), arrays(1, shapes), arrays(10, shapes, positive=True), arrays(11, shapes, positive=True)
    )
    assert one.alpha == pytest.approx(float(alpha), rel=1e-5)


def test_shards_have_an_index_that_names_every_tensor(tmp_path: Path) -> None:
    merge_checkpoints(pair(tmp_path, shard_size=200), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in arrays(0).values())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)
    assert index["weight_map"].keys() == SHAPES.keys()
    # And what was written is read again.
    report = merge_checkpoints(MergePlan((tmp_path / "out", tmp_path / "A.safetensors"), "linear"), tmp_path / "again")  # type: ignore[arg-type]
    assert report.files == ["model.safetensors"]


def test_the_card_has_the_plan_the_prediction_and_the_digests(tmp_path: Path) -> None:
    report = merge_checkpoints(pair(tmp_path, per="layer"), tmp_path / "out", command="became merge plan.yaml out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert set(report.digests) == {"model 1", "model 2", "Fisher 1", "Fisher 2"}
    assert isinstance(report.alpha, dict)
    for part in (
        *report.digests.values(),
        *(f"{alpha:.6f}" for alpha in report.alpha.values()),
        f"predicted to be {report.gain:.6g} lower",
        "became merge plan.yaml out",
        'per: "layer"',
        f"numpy {np.__version__}",
    ):
        assert part in text
    values = json.loads((tmp_path / "out" / "became_merge.json").read_text(encoding="utf-8"))
    assert values["predicted_gain"] == report.gain


@pytest.mark.parametrize(("rule", "passes"), [("became", 2), ("fisher", 1)])
def test_a_preview_says_what_will_be_read_and_written(
    tmp_path: Path, rule: Literal["became", "fisher"], passes: int
) -> None:
    plan = pair(tmp_path, merge_method=rule)
    shown = preview(plan)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{n}.safetensors" for n in ("A", "B", "FA", "FB")]
    report = merge_checkpoints(plan, tmp_path / "out")
    assert (shown.bytes_to_read, shown.bytes_to_write) == (report.bytes_read, report.bytes_written)
    assert shown.passes == passes
    assert shown.seconds > 0


def test_a_preview_names_memory_in_which_regmean_can_be_done(tmp_path: Path) -> None:
    models = []
    for k, name in enumerate("AB"):
        model = saved(tmp_path, name, arrays(k, {"w": (4, 1500)}))
        models.append(PlannedModel(model, gram=saved(tmp_path, f"G{name}", {"w": np.eye(1500, dtype=np.float32)})))
    plan = MergePlan(tuple(models), "regmean")
    merge_checkpoints(plan, tmp_path / "out", memory=preview(plan).memory)


def test_a_merge_loads_no_framework_and_needs_none(tmp_path: Path) -> None:
    plan = pair(tmp_path)
    words = [[str(model.model), str(model.fisher)] for model in plan.models]
    code = f"""
import sys
for name in ("torch", "jax", "tensorflow", "keras", "flax", "transformers"):
    sys.modules[name] = None
from pathlib import Path
from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints
models = tuple(PlannedModel(Path(model), fisher=Path(fisher)) for model, fisher in {words!r})
print(merge_checkpoints(MergePlan(models), {str(tmp_path / "out")!r}).alpha)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    expected = optimal_alpha(arrays(0), arrays(1), arrays(10, positive=True), arrays(11, positive=True))
    assert float(done.stdout) == pytest.approx(float(expected), rel=1e-5)


def test_regmean_fits_the_outputs_of_linear_layers(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.weight"
    generator = np.random.default_rng(5)
    inputs = [generator.normal(size=(20, 5)) for _ in range(2)]
    models = []
    for k, rows in enumerate(inputs):
        gram = saved(tmp_path, f"G{k}", {name: rows.T @ rows})
        models.append(PlannedModel(saved(tmp_path, f"M{k}", arrays(k)), weight=1.0 + k, gram=gram))
    merge_checkpoints(MergePlan(tuple(models), "regmean"), tmp_path / "out")
    out = merged(tmp_path / "out")
    # The least squares fit to both models' outputs, the second one's counted twice.
    stacked = np.concatenate([inputs[0], np.sqrt(2) * inputs[1]])
    outputs = np.concatenate([inputs[0] @ arrays(0)[name].T, np.sqrt(2) * inputs[1] @ arrays(1)[name].T])
    assert_allclose(out[name], np.linalg.lstsq(stacked, outputs, rcond=None)[0].T, rtol=1e-4, atol=1e-5)
    other = "model.layers.1.mlp.weight"
    assert_allclose(out[other], (arrays(0)[other] + 2 * arrays(1)[other]) / 3, rtol=1e-5, atol=1e-6)


def test_regmean_keeps_the_mean_where_no_inputs_were_and_works_across_slabs(tmp_path: Path) -> None:
    shapes = {"w.weight": (SLAB // 50, 70)}
    gram = np.zeros((70, 70))
    gram[:3, :3] = np.eye(3)
    models = [
        PlannedModel(saved(tmp_path, f"M{k}", arrays(k, shapes)), gram=saved(tmp_path, f"G{k}", {"w.weight": g}))
        for k, g in enumerate((gram, 3 * gram))
    ]
    merge_checkpoints(MergePlan(tuple(models), "regmean"), tmp_path / "out")
    first, second, out = (
        arrays(0, shapes)["w.weight"],
        arrays(1, shapes)["w.weight"],
        merged(tmp_path / "out")["w.weight"],
    )
    assert_allclose(out[:, :3], (first[:, :3] + 3 * second[:, :3]) / 4, atol=1e-5)
    assert_allclose(out[:, 3:], (first[:, 3:] + second[:, 3:]) / 2, atol=1e-5)
    wrong = PlannedModel(models[0].model, gram=saved(tmp_path, "G", {"w.weight": np.eye(2)}))
    with pytest.raises(BecameError, match=r"should have a Gram matrix of 'w.weight', .* but has \[2, 2\]"):
        merge_checkpoints(MergePlan((models[0], wrong), "regmean"), tmp_path / "wrong")
    unknown = PlannedModel(models[0].model, gram=saved(tmp_path, "H", {"w": np.eye(70)}))
    with pytest.raises(BecameError, match="has a Gram matrix of 'w', which is no merged weight"):
        merge_checkpoints(MergePlan((unknown, unknown), "regmean"), tmp_path / "wrong")
    with pytest.raises(BecameError, match="linear makes no use of a file of Gram matrices"):
        merge_checkpoints(MergePlan(tuple(models), "linear"), tmp_path / "wrong")
    triangle = PlannedModel(models[0].model, gram=saved(tmp_path, "T", {"w.weight": np.triu(np.ones((70, 70)))}))
    with pytest.raises(BecameError, match=r"'w.weight' of .*T.safetensors is not symmetric, as the Gram matrix"):
        merge_checkpoints(MergePlan((models[0], triangle), "regmean"), tmp_path / "wrong")
    nothing = tuple(PlannedModel(model.model, weight=0.0, gram=model.gram) for model in models)
    with pytest.raises(BecameError, match="all models have the weight 0, so that none counts"):
        merge_checkpoints(MergePlan(nothing, "regmean"), tmp_path / "wrong")
