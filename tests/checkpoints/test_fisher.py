"""Fisher files: exact per-sample squares from data, Adam's second moments, and sums of files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors import safe_open
from safetensors.numpy import load_file

from adapters.checkpoints import MergePlan, PlannedModel, add_fisher_files, merge_checkpoints, open_checkpoint
from adapters.checkpoints.digest import digest_of
from adapters.runs.lock import locked
from became_core import BecameError
from tests.checkpoints.models import Arrays, arrays, saved
from tests.checkpoints.networks import CLASSES, MIXING_SHAPES, SHAPES, WIDTH, load, load_mixing

USUAL = {"became.fisher": "1", "kind": "empirical", "unit": "sum", "per": "sample", "samples": "3", "tokens": "5"}


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "numpy") as opened:
        return dict(opened.metadata())


def data(file: Path, samples: int, seed: int = 0, *, positions: int | None = None) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    leading = (samples,) if positions is None else (samples, positions)
    inputs = generator.normal(size=(*leading, WIDTH)).astype(np.float32)
    targets = generator.integers(0, CLASSES, leading)
    np.savez(file, inputs=inputs, targets=targets)
    return inputs, targets


def gradient(network: Any, inputs: Any, target: Any, position: Any = slice(None)) -> Arrays:
    """Of one sample's loss, the plain way."""
    import torch

    network.zero_grad()
    logits = network(torch.from_numpy(np.atleast_2d(inputs)))[position]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(np.atleast_1d(target)), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: value.grad.numpy().astype(float) for name, value in network.named_parameters()}


def measured(tmp_path: Path, name: str = "F", **options: Any) -> Path:
    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import read_samples

    model, out = tmp_path / "M.safetensors", tmp_path / f"{name}.safetensors"
    samples = read_samples(str(tmp_path / f"{options.pop('data', 'data')}.npz"))
    fisher_from_data(model, samples, out, FisherRequest(**options), load(model))
    return out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    pytest.importorskip("torch")
    return saved(tmp_path, "M", arrays(3, SHAPES))


def test_it_is_the_sum_of_every_samples_squared_gradient(tmp_path: Path, model: Path) -> None:
    inputs, targets = data(tmp_path / "data.npz", 7)
    values = load_file(measured(tmp_path, chunk=3))
    expected = [gradient(load(model), row, target) for row, target in zip(inputs, targets, strict=True)]
    for name, value in values.items():
        assert_allclose(value, sum(each[name] ** 2 for each in expected), rtol=1e-5)
    words = metadata(tmp_path / "F.safetensors")
    assert (words["kind"], words["unit"], words["per"], words["samples"]) == ("empirical", "sum", "sample", "7")
    assert words["model"] == digest_of(open_checkpoint(model))


def test_a_token_has_a_gradient_of_its_own_and_a_sample_the_sum(tmp_path: Path, model: Path) -> None:
    inputs, targets = data(tmp_path / "data.npz", 4, positions=3)
    each = [[gradient(load(model), inputs[n, p], targets[n, p]) for p in range(3)] for n in range(4)]
    by_sample, by_token = load_file(measured(tmp_path, "S")), load_file(measured(tmp_path, "T", per="token"))
    for name in SHAPES:
        assert_allclose(by_sample[name], sum(sum(g[name] for g in row) ** 2 for row in each), rtol=1e-5)
        assert_allclose(by_token[name], sum(g[name] ** 2 for row in each for g in row), rtol=1e-5)
    assert metadata(tmp_path / "T.safetensors")["tokens"] == "12"


def test_the_true_fisher_weighs_all_labels_and_samples_of_them_agree(tmp_path: Path, model: Path) -> None:
    import torch

    inputs, _ = data(tmp_path / "data.npz", 5)
    true = load_file(measured(tmp_path, kind="true"))
    probabilities = load(model)(torch.from_numpy(inputs)).softmax(-1).detach().numpy()
    for name in SHAPES:
        expected = sum(
            probabilities[n, c] * gradient(load(model), inputs[n], np.int64(c))[name] ** 2
            for n in range(5)
            for c in range(CLASSES)
        )
        assert_allclose(true[name], expected, rtol=1e-4)
    drawn = [load_file(measured(tmp_path, f"D{seed}", kind="sampled", seed=seed)) for seed in range(150)]
    mean = {name: np.mean([values[name] for values in drawn], axis=0) for name in SHAPES}
    total = [sum(float(values[name].sum()) for name in SHAPES) for values in (mean, true)]
    assert total[0] == pytest.approx(total[1], rel=0.1)


def test_neither_chunks_nor_an_interruption_change_what_is_drawn(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.checkpoints import fisher_data
    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import read_samples

    data(tmp_path / "data.npz", 9)
    whole = load_file(measured(tmp_path, kind="sampled", chunk=9))
    for name, value in load_file(measured(tmp_path, "C", kind="sampled", chunk=2)).items():
        assert_allclose(value, whole[name], rtol=1e-6)
    monkeypatch.setattr(fisher_data, "SAVE_EVERY", 1)
    samples, out = read_samples(str(tmp_path / "data.npz")), tmp_path / "I.safetensors"
    request, seen = FisherRequest("sampled", chunk=2), list[int]()

    class Stop(Exception):  # noqa: N818 # it is no error
        pass

    def stop(done: int, _: int) -> None:
        seen.append(done)
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        fisher_from_data(model, samples, out, request, load(model), stop)
    fisher_from_data(model, samples, out, request, load(model), lambda done, _: seen.append(done))
    assert seen == [2, 4, 6, 8, 9]
    assert_array_equal(load_file(out)["0.weight"], load_file(tmp_path / "C.safetensors")["0.weight"])
    assert list(tmp_path.glob(".*")) == []


def test_sums_of_other_data_are_not_gone_on_with(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.checkpoints import fisher_data
    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import read_samples

    monkeypatch.setattr(fisher_data, "SAVE_EVERY", 1)

    def stop(*_: int) -> None:
        raise ZeroDivisionError

    data(tmp_path / "data.npz", 4)
    out, request = tmp_path / "F.safetensors", FisherRequest(chunk=2)
    with pytest.raises(ZeroDivisionError):
        fisher_from_data(model, read_samples(str(tmp_path / "data.npz")), out, request, load(model), stop)
    data(tmp_path / "data.npz", 4, seed=1)  # as many
    found, expected = load_file(measured(tmp_path, chunk=2)), load_file(measured(tmp_path, "whole", chunk=4))
    for name, value in expected.items():
        assert_allclose(found[name], value, rtol=1e-6)


def test_sums_by_another_network_of_the_same_text_are_not_gone_on_with(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a loader that was mended after an interruption: the layers are printed alike, and compute otherwise."""
    from adapters.checkpoints import fisher_data
    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import read_samples

    monkeypatch.setattr(fisher_data, "SAVE_EVERY", 1)
    data(tmp_path / "data.npz", 4)
    samples, out, request = read_samples(str(tmp_path / "data.npz")), tmp_path / "F.safetensors", FisherRequest(chunk=2)

    def stop(*_: int) -> None:
        raise ZeroDivisionError

    wrong = load(model)
    wrong.forward = lambda inputs: type(wrong).forward(wrong, 2 * inputs)
    assert repr(wrong) == repr(load(model))
    with pytest.raises(ZeroDivisionError):
        fisher_from_data(model, samples, out, request, wrong, stop)
    found, expected = load_file(measured(tmp_path, chunk=2)), load_file(measured(tmp_path, "whole", chunk=4))
    for name, value in expected.items():
        assert_allclose(found[name], value, rtol=1e-6)


def test_what_a_name_or_a_file_holds_may_be_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.checkpoints.fisher_inputs import called, read_samples

    monkeypatch.chdir(tmp_path)
    (tmp_path / "became_named.py").write_text("number = 3\n")
    (tmp_path / "became_broken.py").write_text("def\n")
    with pytest.raises(BecameError, match="'became_named:number' is a int and no function"):
        called("became_named:number")
    with pytest.raises(BecameError, match="there is no function 'became_broken:f'"):
        called("became_broken:f")
    np.savez(tmp_path / "scalar.npz", inputs=np.zeros((2, WIDTH), np.float32), targets=np.int64(1))
    with pytest.raises(BecameError, match="has neither 'tokens'"):
        read_samples(str(tmp_path / "scalar.npz"))


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_a_tokens_gradient_reaches_all_positions_and_what_taps_do_not_know_is_named(
    tmp_path: Path, model: Path, kind: str
) -> None:
    import torch

    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import read_samples

    mixing, out = saved(tmp_path, "X", arrays(3, SHAPES) | arrays(4, {"rate": (5,)})), tmp_path / "F.safetensors"
    assert model.exists()
    inputs, targets = data(tmp_path / "data.npz", 3, positions=2)
    request = FisherRequest(kind, "token", chunk=2)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"taps do not know how .*'rate' .* by Exp") as caught:
        fisher_from_data(mixing, read_samples(str(tmp_path / "data.npz")), out, request, load_mixing(mixing))
    assert len(caught) == 1
    values, network = load_file(out), load_mixing(mixing)
    expected = {name: np.zeros(shape) for name, shape in MIXING_SHAPES.items()}
    for row, labels in zip(inputs, targets, strict=True):
        chances = network(torch.from_numpy(row[None])).softmax(-1).detach().numpy()[0]
        for p in range(2):
            for c in [labels[p]] if kind == "empirical" else range(CLASSES):
                weight = 1.0 if kind == "empirical" else chances[p, c]
                for name, value in gradient(network, row[None], c, (0, slice(p, p + 1))).items():
                    expected[name] += weight * value**2
    for name, value in expected.items():
        assert_allclose(values[name], value, rtol=2e-4, atol=1e-7)


def test_it_is_the_fisher_information_of_continual(tmp_path: Path, model: Path) -> None:
    import torch

    from adapters.torch import Continual

    inputs, targets = (torch.from_numpy(value) for value in data(tmp_path / "data.npz", 6))
    learning = Continual(load(model), fisher="true", check=False)
    learning.remember([(inputs, targets)])
    assert learning.posterior is not None
    values = load_file(measured(tmp_path, kind="true", chunk=6))
    for name, value in learning.posterior.precision.diagonal().items():
        assert_allclose(values[name], 6 * value.numpy(), rtol=1e-6)


def test_a_tied_parameter_has_the_name_of_its_file_and_one_that_is_untied_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import read_samples

    class Tied(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, *, tied: bool) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, CLASSES, bias=False)
            self.table = self.head if tied else torch.nn.Linear(3, CLASSES, bias=False)

        def forward(self, inputs: Any) -> Any:
            return self.head(torch.tanh(self.table(inputs)))

    weight, file = torch.ones(CLASSES, 3), tmp_path / "M.bin"
    torch.save({"table.weight": weight, "head.weight": weight}, file)
    assert open_checkpoint(file).tied == {"head.weight": "table.weight"}
    generator = np.random.default_rng(0)
    inputs, targets = generator.normal(size=(4, 3)).astype(np.float32), generator.integers(0, CLASSES, 4)
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=targets)
    samples = read_samples(str(tmp_path / "data.npz"))
    fisher_from_data(file, samples, tmp_path / "F.safetensors", FisherRequest(), Tied(tied=True))
    assert list(load_file(tmp_path / "F.safetensors")) == ["table.weight"]
    with pytest.raises(BecameError, match="is a parameter of its own in the network, but tied in"):
        fisher_from_data(file, samples, tmp_path / "G.safetensors", FisherRequest(), Tied(tied=False))


@pytest.mark.usefixtures("model")
def test_files_of_disjoint_data_add(tmp_path: Path) -> None:
    inputs, targets = data(tmp_path / "data.npz", 6)
    np.savez(tmp_path / "one.npz", inputs=inputs[:2], targets=targets[:2])
    np.savez(tmp_path / "two.npz", inputs=inputs[2:], targets=targets[2:])
    parts = [measured(tmp_path, name, data=name) for name in ("one", "two")]
    add_fisher_files(parts, tmp_path / "sum.safetensors")
    whole = load_file(measured(tmp_path))
    for name, value in load_file(tmp_path / "sum.safetensors").items():
        assert_allclose(value, whole[name], rtol=1e-6)
    assert metadata(tmp_path / "sum.safetensors") == metadata(tmp_path / "F.safetensors")


def test_means_add_by_their_counts(tmp_path: Path) -> None:
    files = [
        saved(tmp_path, f"F{k}", arrays(k, positive=True), USUAL | {"unit": "mean", "samples": str(count)})
        for k, count in enumerate((1, 3))
    ]
    add_fisher_files(files, tmp_path / "sum.safetensors")
    for name, value in load_file(tmp_path / "sum.safetensors").items():
        expected = 0.25 * arrays(0, positive=True)[name] + 0.75 * arrays(1, positive=True)[name]
        assert_allclose(value, expected, rtol=1e-6)
    assert metadata(tmp_path / "sum.safetensors")["samples"] == "4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": "a"}, "of another model"),
        ({"kind": "true"}, "has kind"),
        ({"unit": "mean"}, "has unit"),
        ({"per": "token"}, "has per"),
    ],
)
def test_files_that_are_not_alike_do_not_add(tmp_path: Path, words: dict[str, str], message: str) -> None:
    first = saved(tmp_path, "F0", arrays(0, positive=True), USUAL)
    files = [first, saved(tmp_path, "F1", arrays(1, positive=True), USUAL | words)]
    with pytest.raises(BecameError, match=message):
        add_fisher_files(files, tmp_path / "sum.safetensors")
    assert not (tmp_path / "sum.safetensors").exists()


def test_a_sum_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    large = {"w": np.full(3, 3e38, np.float32)}
    files = [saved(tmp_path, f"F{k}", large, USUAL) for k in range(2)]
    with pytest.raises(BecameError, match=r"'w' of .*sum.* no finite number"):
        add_fisher_files(files, tmp_path / "sum.safetensors")
    assert sorted(tmp_path.iterdir()) == files


def test_neither_a_link_nor_another_process_is_overwritten(tmp_path: Path) -> None:
    files = [saved(tmp_path, f"F{k}", arrays(k, positive=True), USUAL) for k in range(2)]
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    with pytest.raises(BecameError, match=r"link.* exists; nothing is overwritten"):
        add_fisher_files(files, tmp_path / "link.safetensors")
    with locked(tmp_path / ".sum.safetensors.lock"), pytest.raises(BecameError, match="is at work in"):
        add_fisher_files(files, tmp_path / "sum.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["F0.safetensors", "F1.safetensors", "link.safetensors"]


def optimizer(tmp_path: Path, *, groups: int = 1, **options: Any) -> tuple[Path, Path, dict[str, Any]]:
    """What a training with AdamW leaves: its state, the weights in the model's order, and the true second moments."""
    import torch

    network = load(tmp_path / "M.safetensors")
    named = dict(network.named_parameters())
    matrices = [value for value in named.values() if value.ndim > 1]
    vectors = [value for value in named.values() if value.ndim < 2]
    parts: Any = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}] if groups == 2 else named.values()
    adam = torch.optim.AdamW(parts, betas=(0.9, 0.99), **options)
    moments = {name: torch.zeros_like(value) for name, value in named.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        adam.zero_grad()
        network(torch.randn((6, WIDTH), generator=generator)).square().sum().backward()
        for name, value in named.items():
            assert value.grad is not None
            moments[name] = 0.99 * moments[name] + 0.01 * value.grad**2
        adam.step()
    torch.save(adam.state_dict(), tmp_path / "optimizer.pt")
    torch.save(network.state_dict(), tmp_path / "end.bin")
    return tmp_path / "optimizer.pt", tmp_path / "end.bin", {n: (v / (1 - 0.99**5)).numpy() for n, v in moments.items()}


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("groups", [1, 2])
def test_adams_second_moments_are_corrected_for_their_start(tmp_path: Path, groups: int) -> None:
    from adapters.checkpoints.fisher_adam import fisher_from_optimizer

    state, end, expected = optimizer(tmp_path, groups=groups)
    remarks = fisher_from_optimizer(state, end, tmp_path / "F.safetensors")
    for name, value in load_file(tmp_path / "F.safetensors").items():
        assert_allclose(value, expected[name], rtol=1e-5)
    words = metadata(tmp_path / "F.safetensors")
    assert (words["kind"], words["per"], words["steps"], words["beta2"]) == ("adam", "step", "5", "0.99")
    assert any("clipped, accumulated or scaled" in remark for remark in remarks)
    plan = MergePlan(tuple(PlannedModel(end, fisher=tmp_path / "F.safetensors") for _ in range(2)))
    assert merge_checkpoints(plan, tmp_path / "out").alpha == 0.0


@pytest.mark.usefixtures("model")
def test_names_in_the_state_or_in_a_file_say_which_parameter_is_which(tmp_path: Path) -> None:
    import torch

    from adapters.checkpoints.fisher_adam import fisher_from_optimizer

    state, end, expected = optimizer(tmp_path)
    unordered = saved(tmp_path, "end", {n: t.whole() for n, t in open_checkpoint(end).tensors.items()})
    with pytest.raises(BecameError, match=r"has lost their order; give --names"):
        fisher_from_optimizer(state, unordered, tmp_path / "F.safetensors")
    fisher_from_optimizer(state, unordered, tmp_path / "F.safetensors", list(SHAPES))
    content = torch.load(state, weights_only=True)
    content["param_groups"][0]["param_names"] = list(SHAPES)
    torch.save(content, state)
    fisher_from_optimizer(state, unordered, tmp_path / "G.safetensors")
    for name, value in expected.items():
        assert_allclose(load_file(tmp_path / "F.safetensors")[name], value, rtol=1e-5)
        assert_allclose(load_file(tmp_path / "G.safetensors")[name], value, rtol=1e-5)
    with pytest.raises(BecameError, match="3 parameters, and 2 different names"):
        fisher_from_optimizer(state, unordered, tmp_path / "H.safetensors", list(SHAPES)[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state1": 1, "qmap1": 1}, "an 8-bit optimiser"),
        ({"exp_avg_sq_row": 1}, "Adafactor"),
        ({"momentum_buffer": 1}, "SGD"),
        ({}, "it is no state of Adam"),
        ({"exp_avg_sq": "int"}, "8-bit state"),
        ({"exp_avg_sq": "zero"}, "step 0"),
    ],
)
@pytest.mark.usefixtures("model")
def test_a_state_that_is_not_adams_is_refused_by_its_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import torch

    from adapters.checkpoints.fisher_adam import fisher_from_optimizer

    state, end, _ = optimizer(tmp_path)
    content = torch.load(state, weights_only=True)
    if change.get("exp_avg_sq") == "int":
        change = {"exp_avg_sq": torch.zeros((5, WIDTH), dtype=torch.uint8), "step": 3}
    if change.get("exp_avg_sq") == "zero":
        change = {"exp_avg_sq": torch.zeros(5, WIDTH), "step": 0}
    content["state"][0] = change
    torch.save(content, state)
    with pytest.raises(BecameError, match=message):
        fisher_from_optimizer(state, end, tmp_path / "F.safetensors")
    torch.save({"w": torch.zeros(3)}, state)
    with pytest.raises(BecameError, match="no optimiser's state"):
        fisher_from_optimizer(state, end, tmp_path / "F.safetensors")
    assert not (tmp_path / "F.safetensors").exists()


@pytest.mark.usefixtures("model")
def test_a_state_that_holds_anything_anywhere_is_refused(tmp_path: Path) -> None:
    import torch

    from adapters.checkpoints.fisher_adam import fisher_from_optimizer

    state, end, _ = optimizer(tmp_path)
    usual = "no optimiser's state"
    cases: list[tuple[tuple[Any, ...], Any, str]] = [
        (("param_groups",), 5, usual), (("param_groups",), [1], usual), (("param_groups", 0), {}, usual),
        (("param_groups", 0, "params"), [[1]], usual), (("param_groups", 0, "betas"), (0.9,), usual),
        (("param_groups", 0, "betas"), ("a", "b"), usual), (("param_groups", 0, "param_names"), 3, usual),
        (("param_groups", 0, "param_names"), ["a"], "'param_names' that are not a name for each of 3"),
        (("state",), [1], usual), (("state", 0), 3, usual), (("state", 0, "step"), "x", usual),
        (("state", 0, "step"), torch.tensor(float("inf")), usual), (("state", 0, "step"), 10**400, "step 1000"),
        (("state", 0, "exp_avg_sq"), [1.0], "no dense tensor"),
        (("state", 0, "exp_avg_sq"), torch.zeros(5, WIDTH, device="meta"), "no dense tensor"),
        (("state", 0, "exp_avg_sq"), torch.full((5, WIDTH), float("nan")), "'exp_avg_sq' of '.*' that is neg"),
        (("state", 0, "exp_avg_sq"), -torch.ones(5, WIDTH), "'exp_avg_sq' of '.*' that is negative, infinite"),
    ]  # fmt: skip
    for path, value, message in cases:
        content = place = torch.load(state, weights_only=True)
        for word in path[:-1]:
            place = place[word]
        place[path[-1]] = value
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(BecameError, match=message) as error:
            fisher_from_optimizer(tmp_path / "other.pt", end, tmp_path / "F.safetensors")
        assert len(str(error.value)) < 400
        assert not (tmp_path / "F.safetensors").exists()


def test_random_tokens_come_with_a_warning_and_data_that_is_none_with_a_sentence(tmp_path: Path) -> None:
    from adapters.checkpoints.fisher_inputs import read_samples

    samples = read_samples("random:3x5x7", seed=1)
    assert samples.inputs.shape == samples.targets.shape == (3, 4)
    assert_array_equal(samples.inputs[:, 1:], samples.targets[:, :-1])
    assert "no text" in samples.notes[0]
    (tmp_path / "text.txt").write_text("ab\n\ncde\n", encoding="utf-8")
    lines = read_samples(str(tmp_path / "text.txt"), lambda text: [ord(letter) for letter in text])
    assert lines.inputs.tolist() == [[97, 0], [99, 100]]
    assert lines.targets.tolist() == [[98, -100], [100, 101]]
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name, message in (
        ("random:3x5", "SAMPLESxLENGTHxVOCABULARY"),
        ("random:1000000x1000000x9", "1,000,000,000,000 tokens; give at most 100,000,000"),
        (str(tmp_path / "missing.npz"), "there is no file"),
        (str(tmp_path / "other.npz"), "neither 'tokens'"),
        (str(tmp_path / "text.txt"), "no data that is known"),
    ):
        with pytest.raises(BecameError, match=message):
            read_samples(name)


@pytest.mark.parametrize(
    ("arrays_of_data", "message"),
    [
        ({"tokens": np.zeros((0, 4), int)}, "has no samples"),
        ({"tokens": np.zeros((3, 1), int)}, "sequences of 1 tokens; give at least two"),
        ({"tokens": np.zeros((3, 4))}, "targets that are no class numbers"),
        ({"inputs": np.zeros((2, WIDTH)), "targets": np.asarray([0, -5])}, "targets that are no class numbers"),
        ({"inputs": np.zeros((2, WIDTH)), "targets": np.asarray([0.0, 1.0])}, "targets that are no class numbers"),
        ({"inputs": np.zeros((0, WIDTH)), "targets": np.zeros(0, int)}, "has no samples"),
    ],
)
def test_data_that_no_model_takes_is_refused(tmp_path: Path, arrays_of_data: Any, message: str) -> None:
    from adapters.checkpoints.fisher_inputs import read_samples

    np.savez(tmp_path / "data.npz", **arrays_of_data)
    with pytest.raises(BecameError, match=message):
        read_samples(str(tmp_path / "data.npz"))


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (np.zeros((3, WIDTH + 1), np.float32), [0, 1, 2], "cannot take the samples 0 to 1: mat1 and mat2"),
        (np.zeros((3, WIDTH), np.int64), [0, 1, 2], "cannot take the samples 0 to 1: mat1 and mat2"),
        (np.zeros((3, WIDTH), np.float32), [0, 1, CLASSES], "have a label 3, and .* has the classes 0 to 2"),
    ],
)
@pytest.mark.usefixtures("model")
def test_samples_that_the_model_cannot_take_are_named(tmp_path: Path, inputs: Any, targets: Any, message: str) -> None:
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=targets)
    with pytest.raises(BecameError, match=message):
        measured(tmp_path, chunk=2)
    assert not (tmp_path / "F.safetensors").exists()


@pytest.mark.usefixtures("model")
def test_the_folder_of_a_fisher_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import adapters.checkpoints.fisher_data as module

    data(tmp_path / "data.npz", 4)
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    assert measured(tmp_path, "new/folder/F", chunk=1).exists()


def test_a_model_that_transformers_cannot_find_is_not_looked_for_elsewhere(tmp_path: Path, model: Path) -> None:
    from adapters.checkpoints.fisher_inputs import load_model

    for path in (model, tmp_path / "someone"):
        with pytest.raises(BecameError, match=r"a folder with a config.json, which .* is not; give --load"):
            load_model(path, None)


def test_a_file_is_not_added_to_itself(tmp_path: Path) -> None:
    file = saved(tmp_path, "F", arrays(0, SHAPES, positive=True), USUAL)
    (tmp_path / "link.safetensors").symlink_to(file)
    with pytest.raises(BecameError, match="is given twice"):
        add_fisher_files([file, tmp_path / "link.safetensors"], tmp_path / "sum.safetensors")
