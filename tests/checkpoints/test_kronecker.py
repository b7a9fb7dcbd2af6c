"""Fisher files with Kronecker factors: what they hold, and merges by them, against dense matrices in float64."""

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from safetensors.numpy import load_file

from adapters.checkpoints import MergePlan, PlannedModel, add_fisher_files, merge_checkpoints, open_checkpoint, preview
from adapters.checkpoints.opening import open_job
from became_core import BecameError
from reference.formulas import alpha_star
from reference.precisions import block_diagonal, kronecker_matrix
from reference.quadratics import height, minimum_on_simplex
from tests.checkpoints.models import arrays, contents, saved
from tests.checkpoints.networks import CLASSES, WIDTH, load

SHAPES: dict[str, tuple[int, ...]] = {"0.weight": (4, 3), "0.bias": (4,), "1.conv.weight": (2, 3, 2), "2.rate": ()}
SAMPLES = {"A": 7, "B": 3, "C": 5}
WORDS = {"became.fisher": "1", "kind": "empirical", "unit": "sum", "per": "sample", "factors": "kronecker"}
Matrix = NDArray[np.float64]


def fisher(seed: int) -> dict[str, NDArray[Any]]:
    """Factors of the two matrices, and diagonals of the rest."""
    generator = np.random.default_rng(seed)

    def factor(size: int) -> NDArray[Any]:
        root = generator.normal(size=(size, size + 2))
        return np.asarray(root @ root.T, np.float32)

    tensors = {"0.bias": generator.random(4, np.float32), "2.rate": generator.random((), np.float32)}
    for name in ("0.weight", "1.conv.weight"):
        rows, *others = SHAPES[name]
        tensors |= {f"{name}@A": factor(int(np.prod(others))), f"{name}@G": factor(rows)}
    return {name: np.asarray(value) for name, value in tensors.items()}


def models(folder: Path, *names: str) -> tuple[PlannedModel, ...]:
    for k, name in enumerate(names):
        saved(folder, name, arrays(k, SHAPES))
        saved(folder, f"F{name}", fisher(20 + k), {**WORDS, "samples": str(SAMPLES[name])})
    return tuple(PlannedModel(folder / f"{n}.safetensors", fisher=folder / f"F{n}.safetensors") for n in names)


def flat(values: Mapping[str, Any], names: Any = SHAPES) -> Matrix:
    return np.concatenate([np.asarray(values[name], np.float64).reshape(-1) for name in names])


def dense(seed: int, samples: int, names: Any = SHAPES) -> Matrix:
    """The curvature of the sum of one model's losses, from the definition of its factors."""
    values = {name: value.astype(np.float64) for name, value in fisher(seed).items()}
    return block_diagonal(
        *(
            kronecker_matrix(values[f"{name}@A"] / samples, values[f"{name}@G"], 0.0)
            if f"{name}@A" in values
            else np.diag(values[name].reshape(-1))
            for name in names
        )
    )


def test_alpha_and_the_gain_are_those_of_the_dense_matrices(tmp_path: Path) -> None:
    report = merge_checkpoints(MergePlan(models(tmp_path, "A", "B")), tmp_path / "out")
    first, second = flat(arrays(0, SHAPES)), flat(arrays(1, SHAPES))
    old, new = dense(20, 7), dense(21, 3)
    assert report.alpha == pytest.approx(alpha_star(first, second, old, new, 0 * first, first), rel=1e-8)
    delta = second - first
    slope, curvature = -(delta @ new @ delta), delta @ (old + new) @ delta
    # Leaves with a diagonal are added up in float32.
    assert report.gain == pytest.approx(slope**2 / curvature / 2, rel=1e-8)
    assert report.slopes == pytest.approx((slope, slope + curvature), rel=1e-8)


def test_the_weights_of_models_their_gradients_and_means_count(tmp_path: Path) -> None:
    first, second = models(tmp_path, "A", "B")
    slope, mean = arrays(8, SHAPES), arrays(9, SHAPES)
    second = PlannedModel(second.model, 2.5, second.fisher, gradient=saved(tmp_path, "g", slope))
    first = PlannedModel(first.model, 0.5, first.fisher, mean=saved(tmp_path, "m", mean))
    report = merge_checkpoints(MergePlan((first, second)), tmp_path / "out")
    expected = alpha_star(
        flat(arrays(0, SHAPES)),
        flat(arrays(1, SHAPES)),
        0.5 * dense(20, 7),
        2.5 * dense(21, 3),
        2.5 * flat(slope),
        flat(mean),
    )
    assert report.alpha == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("per", ["layer", "leaf"])
def test_a_layer_and_a_leaf_have_their_own_alpha(tmp_path: Path, per: Any) -> None:
    report = merge_checkpoints(MergePlan(models(tmp_path, "A", "B"), per=per), tmp_path / "out")
    assert isinstance(report.alpha, dict)
    name, names = ("0", ["0.weight", "0.bias"]) if per == "layer" else ("1.conv.weight", ["1.conv.weight"])
    first, second = flat(arrays(0, SHAPES), names), flat(arrays(1, SHAPES), names)
    expected = alpha_star(first, second, dense(20, 7, names), dense(21, 3, names), 0 * first, first)
    assert report.alpha[name] == pytest.approx(expected, rel=1e-9 if per == "leaf" else 1e-8)


def test_three_models_are_on_the_simplex(tmp_path: Path) -> None:
    report = merge_checkpoints(MergePlan(models(tmp_path, "A", "B", "C")), tmp_path / "out")
    thetas = [flat(arrays(k, SHAPES)) for k in range(3)]
    ways = np.stack([theta - thetas[0] for theta in thetas[1:]])
    slope, curvature = np.zeros(3), np.zeros((3, 3))
    full = np.concatenate([np.zeros((1, ways.shape[1])), ways])
    for k, (theta, name) in enumerate(zip(thetas, "ABC", strict=True)):
        matrix = dense(20 + k, SAMPLES[name])
        slope += full @ matrix @ (thetas[0] - theta)
        curvature += full @ matrix @ full.T
    found = np.asarray(report.coefficients[""])
    assert height(slope, curvature, found) == pytest.approx(minimum_on_simplex(slope, curvature), rel=1e-9)
    assert report.gain == pytest.approx(-minimum_on_simplex(slope, curvature), rel=1e-9)


def test_a_merge_by_factors_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    plan = MergePlan(models(tmp_path, "A", "B"), per="leaf")

    class Stop(Exception):  # noqa: N818 # it is no error
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        merge_checkpoints(plan, tmp_path / "out", progress=stop)
    report = merge_checkpoints(plan, tmp_path / "out")
    whole = merge_checkpoints(plan, tmp_path / "whole")
    assert report.digests == whole.digests
    assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]


@pytest.mark.parametrize("rule", ["fisher", "imm-mode", "became"])
def test_rules_that_go_weight_by_weight_refuse_factors(tmp_path: Path, rule: str) -> None:
    plan = MergePlan(models(tmp_path, "A", "B"), merge_method=rule, per="weight" if rule == "became" else "model")
    with pytest.raises(BecameError, match=r"FA.safetensors has Kronecker factors, and .* merges weight by weight"):
        merge_checkpoints(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"0.weight@G": None}, {}, "has only one of '0.weight@A' and '0.weight@G'"),
        ({"0.weight@A": np.eye(4, dtype=np.float32)}, {}, r"shapes \[4, 4\] and \[4, 4\], which do not fit"),
        ({"0.weight@A": np.triu(np.ones((3, 3), np.float32))}, {}, "'0.weight@A' of .* is not symmetric"),
        ({"0.weight@A": -np.eye(3, dtype=np.float32)}, {}, "a negative one on its diagonal"),
        ({"0.weight@G": np.full((4, 4), np.nan, np.float32)}, {}, "'0.weight@G' of .* infinite or not a number"),
        ({"0.weight@G": np.eye(4, dtype=np.int32)}, {}, "holds no floating-point numbers"),
        ({"9.weight@A": np.eye(3, dtype=np.float32)}, {}, "'9.weight@A' is in .* but not in its model"),
        ({"0.weight@A": None, "0.weight@G": None}, {}, "has no '0.weight', in which the models differ"),
        ({}, {"factors": "diagonal"}, "'0.weight@A' is in .* but not in its model"),
        ({}, {"factors": "dense"}, "has factors 'dense'; known are diagonal and kronecker"),
        ({}, {"unit": "mean"}, "must be sums over a known number of samples"),
        ({}, {"samples": "0"}, "must be sums over a known number of samples"),
        (dict.fromkeys(fisher(0)) | {"0.bias": np.ones(4, np.float32)}, {}, "has no '0.weight'"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, change: Any, words: Any, message: str) -> None:
    plan = MergePlan(models(tmp_path, "A", "B"))
    tensors = {name: value for name, value in (fisher(21) | change).items() if value is not None}
    saved(tmp_path, "FB", tensors, WORDS | {"samples": "3"} | words)
    with pytest.raises(BecameError, match=message):
        merge_checkpoints(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factors_and_diagonals_are_not_mixed(tmp_path: Path) -> None:
    plan = MergePlan(models(tmp_path, "A", "B"))
    words = {name: word for name, word in WORDS.items() if name != "factors"}
    saved(tmp_path, "FB", arrays(3, SHAPES, positive=True), {**words, "samples": "3"})
    with pytest.raises(BecameError, match=r"has factors 'kronecker' and .* has 'diagonal'"):
        merge_checkpoints(plan, tmp_path / "out")


def test_what_is_measured_whole_stays_within_the_memory_that_is_named(tmp_path: Path) -> None:
    rows, columns = 700, 300
    eyes = {"w@A": np.eye(columns, dtype=np.float32), "w@G": np.eye(rows, dtype=np.float32)}
    for k, name in enumerate("AB"):
        saved(tmp_path, name, arrays(k, {"w": (rows, columns)}))
        saved(tmp_path, f"F{name}", eyes, {**WORDS, "samples": "2"})
    plan = MergePlan(
        tuple(PlannedModel(tmp_path / f"{n}.safetensors", fisher=tmp_path / f"F{n}.safetensors") for n in "AB")
    )
    job = open_job(plan)
    (block,) = job.measured_blocks(job.measured)
    tracemalloc.start()
    job.measure(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < job.bytes_beside + job.block_bytes
    assert job.bytes_beside < 3 * peak
    with pytest.raises(BecameError, match=r"this merge needs at least .* of memory"):
        merge_checkpoints(plan, tmp_path / "out", memory=job.bytes_beside)
    assert preview(plan).memory > job.bytes_beside


# From data.


def measured(folder: Path, name: str, model: Path, network: Any, **options: Any) -> Path:
    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import read_samples

    out = folder / f"{name}.safetensors"
    data = read_samples(str(folder / f"{options.pop('data', 'data')}.npz"))
    fisher_from_data(model, data, out, FisherRequest(factors="kronecker", **options), network)
    return out


def layer_by_layer(network: Any, inputs: Any, targets: Any, position: Any = slice(None)) -> Any:
    """The inputs and output gradients of the linear layers of one sample's loss, in double precision, by hooks."""
    import torch

    seen: dict[str, Any] = {}
    network = network.double()

    def hook(name: str) -> Any:
        def keep(_: Any, arguments: Any, output: Any) -> None:
            output.retain_grad()
            seen[name] = (arguments[0], output)

        return keep

    handles = [network[k].register_forward_hook(hook(str(k))) for k in (0, 2)]
    logits = network(torch.from_numpy(np.atleast_2d(inputs)).double())
    labels = torch.from_numpy(np.atleast_1d(targets))
    torch.nn.functional.cross_entropy(logits[position], labels[position], reduction="sum").backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    return {name: (a.detach().numpy(), output.grad.numpy()) for name, (a, output) in seen.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    pytest.importorskip("torch")
    from tests.checkpoints.networks import SHAPES as LINEAR

    return saved(tmp_path, "M", arrays(3, LINEAR))


@pytest.mark.parametrize("positions", [1, 3])
def test_the_factors_are_sums_over_samples(tmp_path: Path, model: Path, positions: int) -> None:
    generator = np.random.default_rng(0)
    shape = (7,) if positions == 1 else (7, positions)
    inputs = generator.normal(size=(*shape, WIDTH)).astype(np.float32)
    targets = generator.integers(0, CLASSES, shape)
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=targets)
    values = load_file(measured(tmp_path, "F", model, load(model), chunk=3))
    assert values.keys() == {"0.weight@A", "0.weight@G", "0.bias", "2.weight@A", "2.weight@G"}
    each = [layer_by_layer(load(model), x, y) for x, y in zip(inputs, targets, strict=True)]
    for name in ("0", "2"):
        assert_allclose(values[f"{name}.weight@A"], sum(s[name][0].T @ s[name][0] for s in each) / positions, rtol=1e-5)
        assert_allclose(values[f"{name}.weight@G"], sum(s[name][1].T @ s[name][1] for s in each), rtol=1e-4, atol=1e-7)
    assert_allclose(values["0.bias"], sum(s["0"][1].sum(0) ** 2 for s in each), rtol=1e-5)
    words = open_checkpoint(tmp_path / "F.safetensors").metadata
    assert (words["factors"], words["unit"], words["samples"], words["tokens"]) == (
        "kronecker",
        "sum",
        "7",
        str(targets.size),
    )


def test_tokens_and_all_labels_count_inputs_once(tmp_path: Path, model: Path) -> None:
    import torch

    generator = np.random.default_rng(1)
    inputs = generator.normal(size=(4, 3, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=generator.integers(0, CLASSES, (4, 3)))
    a = np.einsum("npi,npj->ij", inputs.astype(float), inputs.astype(float)) / 3
    by_token = load_file(measured(tmp_path, "T", model, load(model), per="token"))
    true = load_file(measured(tmp_path, "L", model, load(model), kind="true"))
    assert_allclose(by_token["0.weight@A"], a, rtol=1e-5)
    assert_allclose(true["0.weight@A"], a, rtol=1e-5)
    probabilities = load(model)(torch.from_numpy(inputs)).softmax(-1).detach().double().numpy()
    # The output gradients of the last layer are p - e_y, of which the expectation of the square is diag(p) - p p^T.
    expected = np.einsum("npi,ij->ij", probabilities, np.eye(CLASSES)) - np.einsum(
        "npi,npj->ij", probabilities, probabilities
    )
    assert_allclose(true["2.weight@G"], expected, rtol=1e-4, atol=1e-6)


def test_files_of_disjoint_data_add(tmp_path: Path, model: Path) -> None:
    generator = np.random.default_rng(2)
    inputs, targets = generator.normal(size=(6, WIDTH)).astype(np.float32), generator.integers(0, CLASSES, 6)
    parts = {"data": slice(None), "x": slice(2), "y": slice(2, None)}
    for name, part in parts.items():
        np.savez(tmp_path / f"{name}.npz", inputs=inputs[part], targets=targets[part])
    whole, *files = (measured(tmp_path, f"F{name}", model, load(model), data=name) for name in parts)
    add_fisher_files(files, tmp_path / "sum.safetensors")
    assert open_checkpoint(tmp_path / "sum.safetensors").metadata == open_checkpoint(whole).metadata
    total = load_file(tmp_path / "sum.safetensors")
    for name, value in load_file(whole).items():
        assert_allclose(total[name], value, rtol=1e-5, atol=1e-6)


def test_convolutions_have_factors_of_patches_and_large_or_other_weights_diagonals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from torch import nn

    import adapters.checkpoints.fisher_data as module

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 3, 1, groups=3), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3)
    )
    model = saved(tmp_path, "M", {name: value.detach().numpy() for name, value in network.named_parameters()})
    images = np.random.default_rng(0).normal(size=(5, 2, 3, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=images, targets=np.arange(5) % 3)
    monkeypatch.setattr(module, "LARGEST_FACTOR", 8)
    values = load_file(measured(tmp_path, "F", model, network))
    assert {name for name in values if "@" in name} == {"0.weight@A", "0.weight@G"}
    assert {"2.weight", "4.weight", "4.bias", "5.weight", "5.bias", "0.bias"} <= values.keys()
    patches = nn.functional.unfold(torch.from_numpy(images), 2).double().numpy()  # [samples, d_in, positions]
    assert_allclose(values["0.weight@A"], np.einsum("nip,njp->ij", patches, patches) / 4, rtol=1e-5, atol=1e-6)


def test_a_weight_stored_the_other_way_round_has_its_factors_in_the_order_of_its_axes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch import nn

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.from_numpy(arrays(0, {"w": (4, 3)})["w"]))

        def forward(self, inputs: Any) -> Any:
            return inputs @ self.weight

    network = Transposed()
    model = saved(tmp_path, "M", {"weight": network.weight.detach().numpy()})
    inputs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=np.arange(5) % 3)
    values = load_file(measured(tmp_path, "F", model, network))
    assert values["weight@A"].shape == (3, 3)
    assert_allclose(values["weight@G"], inputs.T @ inputs, rtol=1e-5)


def test_a_measurement_of_factors_goes_on(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import adapters.checkpoints.fisher_data as module
    from adapters.checkpoints.fisher_inputs import read_samples

    generator = np.random.default_rng(4)
    np.savez(
        tmp_path / "data.npz",
        inputs=generator.normal(size=(6, WIDTH)).astype(np.float32),
        targets=generator.integers(0, CLASSES, 6),
    )
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    whole = measured(tmp_path, "W", model, load(model), chunk=2).read_bytes()

    def stop(done: int, _: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    request = module.FisherRequest(factors="kronecker", chunk=2)
    data = read_samples(str(tmp_path / "data.npz"))
    with pytest.raises(KeyboardInterrupt):
        module.fisher_from_data(model, data, tmp_path / "F.safetensors", request, load(model), stop)
    states = list[int]()
    module.fisher_from_data(
        model, data, tmp_path / "F.safetensors", request, load(model), lambda done, _: states.append(done)
    )
    assert states == [6]
    assert (tmp_path / "F.safetensors").read_bytes() == whole


def test_the_command_measures_and_merges_by_factors(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    from adapters.cli.__main__ import main

    np.savez(tmp_path / "d.npz", inputs=np.eye(WIDTH, dtype=np.float32), targets=np.arange(WIDTH) % CLASSES)
    other = saved(tmp_path, "N", arrays(4, {name: t.shape for name, t in open_checkpoint(model).tensors.items()}))
    fishers = []
    for each in (model, other):
        fishers.append(each.with_name(f"F{each.name}"))
        words = ["fisher", str(each), "--data", str(tmp_path / "d.npz"), "--out", str(fishers[-1])]
        assert main([*words, "--load", "tests.checkpoints.networks:load", "--factors", "kronecker"]) == 0
    out = ["--out", str(tmp_path / "out")]
    assert main(["merge", str(model), str(other), "--fisher", *map(str, fishers), *out]) == 0
    assert "predicted gain" in capsys.readouterr().out
    assert main(["inspect", str(fishers[0])]) == 0
    assert "factors kronecker" in capsys.readouterr().out


def test_matrices_too_large_for_factors_are_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tyro")
    import adapters.checkpoints.fisher_data as module
    from adapters.cli.__main__ import main

    np.savez(tmp_path / "d.npz", inputs=np.eye(WIDTH, dtype=np.float32), targets=np.arange(WIDTH) % CLASSES)
    words = ["fisher", str(model), "--data", str(tmp_path / "d.npz"), "--load", "tests.checkpoints.networks:load"]
    assert main([*words, "--factors", "kronecker", "--out", str(tmp_path / "F.safetensors")]) == 0
    assert "warning: matrices" not in capsys.readouterr().err
    monkeypatch.setattr(module, "LARGEST_FACTOR", WIDTH - 1)
    assert main([*words, "--factors", "kronecker", "--out", str(tmp_path / "D.safetensors")]) == 0
    values = load_file(tmp_path / "D.safetensors")
    large = [name for name, value in values.items() if "@" not in name and value.ndim == 2]
    shown = " ".join((captured := capsys.readouterr()).out.split() + captured.err.split())
    names = ", ".join(f"'{name}'" for name in large)
    assert large
    assert f"have the diagonal of their curvature, no factors: {names}." in shown
