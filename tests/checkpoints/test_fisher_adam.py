"""Fisher files of Adam's second moments."""

from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import load_file

from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints, open_checkpoint
from became_core import BecameError
from tests.checkpoints.fisher_files import metadata
from tests.checkpoints.models import saved
from tests.checkpoints.networks import SHAPES, WIDTH, load


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
@pytest.mark.parametrize("groups", [1, 2])
def test_a_parameter_that_has_had_no_gradient_is_left_out(tmp_path: Path, groups: int) -> None:
    """As the pooling layer of a language model that is not asked for; no step has moved it."""
    import torch

    from adapters.checkpoints.fisher_adam import fisher_from_optimizer

    state, end, expected = optimizer(tmp_path, groups=groups)
    content = torch.load(state, weights_only=True)
    del content["state"][0]
    torch.save(content, state)
    remarks = fisher_from_optimizer(state, end, tmp_path / "F.safetensors")
    unused = next(name for name, shape in SHAPES.items() if len(shape) > 1)
    assert remarks[-1] == f"The optimiser has no state of '{unused}'."
    found = load_file(tmp_path / "F.safetensors")
    assert found.keys() == expected.keys() - {unused}
    for name, value in found.items():
        assert_allclose(value, expected[name], rtol=1e-5)
    torch.save(content | {"state": {}}, state)
    with pytest.raises(BecameError, match="has no state of any parameter; save it after a step"):
        fisher_from_optimizer(state, end, tmp_path / "G.safetensors")


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
