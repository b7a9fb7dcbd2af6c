"""The file of ``Continual``'s memory: what comes back from it, what is refused, and what a failed save leaves."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import Continual
from became_core import BecameError
from became_core.curvature import Categorical
from became_core.projection import GPM, NSCL, SGP
from tests.torch.modules import CLASSES, WIDTH, Stored
from tests.torch.own_loop import new_data, new_network, train


def test_a_memory_comes_back_from_a_file(tmp_path: Path) -> None:
    model, old, new = new_network("stored"), new_data(1), new_data(2)
    learning = Continual(model, Categorical(weights=(1.0, 2.0, 3.0)), projector=SGP(0.9), penalty=7.0, uncovered="free")
    learning.remember(old)
    file = tmp_path / "memory.safetensors"
    learning.save(file)
    again = Continual.load(model, file)
    assert again.likelihood == learning.likelihood
    assert (again.penalty, again.uncovered, again.decay) == (7.0, "free", 1.0)
    assert str(again.coverage) == str(learning.coverage)
    results = []
    theta = {name: value.detach().clone() for name, value in model.named_parameters()}
    for each in (learning, again):
        model.load_state_dict(theta)
        optimizer = torch.optim.AdamW(model.parameters(), 0.05)
        with each.stable(optimizer):
            train(model, optimizer, new)
        with each.plastic():
            train(model, optimizer, new)
        results.append((each.merge(new).alpha, model.weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    with pytest.raises(BecameError, match=r"the memory of another architecture: the model has no '"):
        Continual.load(new_network("perceptron"), file)
    wider = Stored().double()
    wider.head = nn.Linear(8, 4).double()
    with pytest.raises(BecameError, match=r"'head\.weight' is \[4, 8\] in the model and \[3, 8\] in the memory"):
        Continual.load(wider, file)
    with safe_open(file, "pt") as opened:
        later = json.loads(opened.metadata()["became"]) | {"format": 3}
    save_file(load_file(file), file, {"became": json.dumps(later)})
    with pytest.raises(BecameError, match="a memory of format 3, and this version reads formats 1 and 2; load"):
        Continual.load(model, file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(BecameError, match="is no memory that"):
        Continual.load(model, file)
    own = Continual(model, functional.cross_entropy)
    own.remember(old)
    own.save(file)
    with pytest.raises(BecameError, match="made with a loss of your own; give it as likelihood="):
        Continual.load(model, file)
    assert Continual.load(model, file, likelihood=functional.cross_entropy).coverage.share("protected") > 0


WEIGHTS: dict[str, Callable[[list[float]], Any]] = {
    "a list": list,
    "an array": np.asarray,
    "a tensor": torch.tensor,
    "numbers of NumPy": lambda weights: tuple(map(np.float32, weights)),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_settings_of_any_type_come_back_from_a_file(weights: Any, tmp_path: Path) -> None:
    model, file = new_network("perceptron"), tmp_path / "memory.safetensors"
    likelihood = Categorical(weights=weights([1.0, 5.0, 0.25]), ignored=cast(int, np.int64(-1)))
    projector = GPM(threshold=cast(float, np.float32(0.875)))
    learning = Continual(
        model, likelihood, projector=projector, penalty=cast(float, np.float32(7)), decay=cast(float, np.float32(0.5))
    )
    learning.remember(new_data(1))
    learning.save(file)
    again = Continual.load(model, file)
    assert again.likelihood == Categorical(weights=(1.0, 5.0, 0.25), ignored=-1)
    assert isinstance(again.projector, GPM)
    assert (again.projector.threshold, again.penalty, again.decay) == (0.875, 7.0, 0.5)


def test_a_setting_that_a_file_cannot_hold_is_refused_by_its_name(tmp_path: Path) -> None:
    learning = Continual(new_network("perceptron"), Categorical(weights=cast(Any, range(1, 4))))
    learning.remember(new_data(1))
    with pytest.raises(BecameError, match="'weights' of Categorical is a range, which a file cannot hold; give a"):
        learning.save(tmp_path / "memory.safetensors")


def test_a_projector_of_another_class_than_the_memorys_is_refused(tmp_path: Path) -> None:
    model, file = new_network("perceptron"), tmp_path / "memory.safetensors"
    learning = Continual(model, projector=GPM())
    learning.remember(new_data(1))
    learning.save(file)
    with pytest.raises(
        BecameError, match=r"the projector of the memory in .*memory\.safetensors is GPM, not NSCL; give"
    ):
        Continual.load(model, file, projector=NSCL())
    loaded = Continual.load(model, file, projector=GPM(0.5))
    assert loaded.projector.rank == learning.projector.rank
    assert isinstance(loaded.projector, GPM)
    assert loaded.projector.threshold == 0.5


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no object": (lambda _: [], "'list' object has no attribute 'get'"),
    "no parameters": (lambda memory: {**memory, "parameters": 5}, "'int' is not"),
    "no matrices": (lambda memory: {key: memory[key] for key in memory if key != "matrices"}, "it has no 'matrices'"),
    "no penalty": (lambda memory: {**memory, "penalty": None}, "not 'NoneType'"),
    "no decay": (lambda memory: {key: memory[key] for key in memory if key != "decay"}, "it has no 'decay'"),
    "a likelihood with another field": (
        lambda memory: {**memory, "likelihood": ["Categorical", {"heat": 1.0}]},
        "unexpected keyword argument 'heat'",
    ),
    "a likelihood in another form": (lambda memory: {**memory, "likelihood": 3}, "cannot unpack"),
    "a projector with another field": (
        lambda memory: {**memory, "projector": ["gpm", {"heat": 1.0}]},
        "unexpected keyword argument 'heat'",
    ),
    "a projector without settings": (lambda memory: {**memory, "projector": ["gpm"]}, "not enough values"),
    "a calibration without a number": (lambda memory: {**memory, "format": 2}, "it has no 'kappa'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_file_that_says_too_little_or_something_else_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    changed, message = MALFORMED[name]
    model, file = new_network("perceptron"), tmp_path / "memory.safetensors"
    learning = Continual(model, check=False)
    learning.remember(new_data(1))
    learning.save(file)
    with safe_open(file, "pt") as opened:
        memory = json.loads(opened.metadata()["became"])
    save_file(load_file(file), file, {"became": json.dumps(changed(memory))})
    with pytest.raises(
        BecameError, match=rf"memory\.safetensors is no memory that Continual\.save wrote \(.*{message}"
    ):
        Continual.load(model, file)


def test_a_file_without_a_description_or_with_other_arrays_is_refused_by_its_name(tmp_path: Path) -> None:
    model, file = new_network("perceptron"), tmp_path / "memory.safetensors"
    learning = Continual(model, check=False)
    learning.remember(new_data(1))
    learning.save(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    arrays = load_file(file)
    for content, description, message in (
        (arrays, {}, "it has no 'became'"),
        (arrays, {"became": "{"}, "Expecting property name"),
        (arrays | {"other.weight": torch.ones(1)}, metadata, r"it has an array 'other\.weight'"),
    ):
        save_file(content, file, description)
        with pytest.raises(BecameError, match=rf"memory\.safetensors is no memory that .* \({message}"):
            Continual.load(model, file)


@pytest.mark.parametrize("error", [SafetensorError("I/O error: no space is left"), OSError(28, "No space left")])
def test_a_save_that_fails_leaves_the_memory_that_was_saved_before(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = new_network("perceptron"), tmp_path / "memory.safetensors"
    learning = Continual(model)
    learning.remember(new_data(1))
    learning.save(file)
    before = file.read_bytes()
    learning.remember(new_data(2))

    def stop(_: Any, name: Any, __: Any) -> None:
        Path(name).write_bytes(before[:99])
        raise error

    monkeypatch.setattr("adapters.torch.continual.save_file", stop)
    with pytest.raises(BecameError, match=r"^could not write .*memory\.safetensors: .*[Nn]o space.* left\.$"):
        learning.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_loaded_memory_is_no_view_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = new_network("perceptron"), tmp_path / "memory.safetensors"
    learning = Continual(model)
    learning.remember(new_data(1))
    learning.save(file)
    views: list[Tensor] = []

    class View:
        """A file whose arrays are it, as some versions of safetensors have them."""

        def __init__(self, *named: Any) -> None:
            self._opened: Any = safe_open(*named)

        def __enter__(self) -> Any:
            self._opened.__enter__()
            return self

        def __exit__(self, *how: Any) -> None:
            self._opened.__exit__(*how)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._opened, name)

        def get_tensor(self, name: str) -> Tensor:
            views.append(self._opened.get_tensor(name))
            return views[-1]

    monkeypatch.setattr("adapters.backend.memory_file.safe_open", View)
    loaded = Continual.load(model, file)
    assert loaded.posterior is not None
    for view in views:
        view.zero_()  # the file is written again
    for name, value in model.named_parameters():
        assert torch.equal(loaded.posterior.mean[name], value.detach())


@dataclass(frozen=True)
class _Softened(Categorical):
    """A likelihood of a user's own, with a setting of its own."""

    temperature: float = 2.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = super().loss(outputs / self.temperature, targets)
        return result


def test_a_memory_with_a_likelihood_of_ones_own_is_loaded_with_it(tmp_path: Path) -> None:
    model, file, own = new_network("perceptron"), tmp_path / "memory.safetensors", _Softened()
    learning = Continual(model, own)
    learning.remember(new_data(1))
    learning.save(file)
    with pytest.raises(BecameError, match="made with a loss of your own; give it as likelihood="):
        Continual.load(model, file)
    loaded = Continual.load(model, file, likelihood=own)
    assert loaded.likelihood == own
    assert str(loaded.coverage) == str(learning.coverage)


def test_a_memory_with_a_protected_embedding_comes_back_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(8, CLASSES))
    learning = Continual(model)
    learning.remember([(torch.randint(0, 6, (4, 4)), torch.arange(4) % CLASSES)])
    learning.save(tmp_path / "memory")
    assert Continual.load(model, tmp_path / "memory").projector.rank == learning.projector.rank


class _Heads(nn.Module):
    """A network with a head for each task, of which the last one is used."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, 8)
        self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(heads))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.heads[-1](self.body(inputs).tanh())
        return outputs


@pytest.mark.parametrize("uncovered", ["penalised", "frozen"])
@pytest.mark.parametrize("saved", ["before the head", "with the head"])
def test_a_head_that_data_have_not_seen_is_as_free_after_a_load_as_before(
    uncovered: Any, saved: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, file = _Heads(1).double(), tmp_path / "memory.safetensors"
    learning = Continual(model, uncovered=uncovered)
    learning.remember(new_data(1))
    if saved == "before the head":
        learning.save(file)
    model.heads.append(nn.Linear(8, CLASSES).double())
    if saved == "with the head":
        learning.save(file)
    again = Continual.load(model, file)
    assert str(again.coverage) == str(learning.coverage)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with again.stable(optimizer):
        train(model, optimizer, new_data(2))
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {"heads.1.weight", "heads.1.bias"} <= moved
    assert "heads.0.bias" not in moved
    with pytest.raises(BecameError, match=r"another architecture: the model has no 'heads\.0\.weight'"):
        Continual.load(_Heads(0).double(), file)
