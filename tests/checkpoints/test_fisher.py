"""Fisher information of data: the squares of every single sample, gone on with after an interruption."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from adapters.checkpoints import open_checkpoint
from adapters.checkpoints.digest import digest_of
from became_core import BecameError
from tests.checkpoints.fisher_files import data, gradient, measured, metadata
from tests.checkpoints.models import arrays, saved
from tests.checkpoints.networks import CLASSES, MIXING_SHAPES, SHAPES, WIDTH, load, load_mixing, load_with_body


def test_it_is_the_sum_of_every_samples_squared_gradient(tmp_path: Path, model: Path) -> None:
    inputs, targets = data(tmp_path / "data.npz", 7)
    values = load_file(measured(tmp_path, chunk=3))
    expected = [gradient(load(model), row, target) for row, target in zip(inputs, targets, strict=True)]
    for name, value in values.items():
        assert_allclose(value, sum(each[name] ** 2 for each in expected), rtol=1e-5)
    words = metadata(tmp_path / "F.safetensors")
    assert (words["kind"], words["unit"], words["per"], words["samples"]) == ("empirical", "sum", "sample", "7")
    assert words["model"] == digest_of(open_checkpoint(model))


def test_a_file_of_the_body_alone_is_measured_within_the_whole_model(tmp_path: Path, model: Path) -> None:
    from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
    from adapters.checkpoints.fisher_inputs import read_samples

    data(tmp_path / "data.npz", 5)
    expected, samples = load_file(measured(tmp_path)), read_samples(str(tmp_path / "data.npz"))
    fisher_from_data(model, samples, tmp_path / "B.safetensors", FisherRequest(), load_with_body(model))
    whole = load_file(tmp_path / "B.safetensors")
    assert whole.keys() == expected.keys()
    for name, value in expected.items():
        assert_allclose(whole[name], value, rtol=1e-6)
    other = saved(tmp_path, "other", {f"other.{name}": value for name, value in load_file(model).items()})
    with pytest.raises(BecameError, match=r"network has 'body\.0\.weight' .*other.* does not have; if it was renamed"):
        fisher_from_data(other, samples, tmp_path / "C.safetensors", FisherRequest(), load_with_body(model))


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
