"""Networks of timm as backbones, by a stand-in for the package: what is asked of it, what is computed, what is refused.

The stand-in has the signatures of timm 1.0: ``create_model`` and ``timm.data.resolve_model_data_config``. The package
itself wants torchvision, and is not installed where these tests run.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.networks import HubNetwork, hub_network
from adapters.torch.learner import TorchLearner
from adapters.torch.timm_network import timm_backbone
from became_core import BecameError
from became_core.continual import Adaptation, Annealed, Training, build_method, learn
from tests.streams import prototype_stream, text_stream

NETWORK = HubNetwork("tiny", package="timm")


class Tiny(nn.Module):
    """Patches, a block with a residual connection, and their mean; it takes images of its own size alone, as a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)

    def forward(self, images: Tensor) -> Tensor:
        assert tuple(images.shape[1:]) == (3, 12, 12), "Input size doesn't match model."
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        added: Tensor = self.fc2(torch.relu(self.fc1(self.norm(tokens))))
        features: Tensor = (tokens + added).mean(1)
        return features


def create_model(
    model_name: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,  # noqa: ARG001 # timm's signature
    pretrained_cfg_overlay: Any = None,  # noqa: ARG001
    checkpoint_path: str = "",  # noqa: ARG001
    **kwargs: Any,
) -> nn.Module:
    assert kwargs == {"num_classes": 0}
    if model_name not in ("tiny", "tiny.weightless"):
        raise RuntimeError(f"Unknown model ({model_name})")
    if pretrained and model_name == "tiny.weightless":
        raise RuntimeError("No pretrained weights exist for tiny. Use `pretrained=False` for random init.")
    model = Tiny()
    if pretrained:
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(0.25)
    return model


def resolve_model_data_config(model: nn.Module) -> dict[str, Any]:
    assert isinstance(model, Tiny)
    return {"input_size": (3, 12, 12), "mean": (0.1,) * 3, "std": (0.4,) * 3, "interpolation": "bicubic"}


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    timm, data = ModuleType("timm"), ModuleType("timm.data")
    vars(timm).update(create_model=create_model, data=data)
    vars(data).update(resolve_model_data_config=resolve_model_data_config)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.data", data)


def test_pretrained_weights_see_the_images_that_they_know() -> None:
    stream = prototype_stream(channels=1, side=6)
    backbone = timm_backbone(HubNetwork("tiny", pretrained=True, package="timm"), stream, seed=0).eval()
    pixels = torch.from_numpy(stream.dataset.images[:4]).float() / 255
    (mean,), (std,) = stream.dataset.mean, stream.dataset.std
    resized = nn.functional.interpolate(
        (pixels.expand(-1, 3, -1, -1) - 0.1) / 0.4, (12, 12), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        expected = create_model("tiny", pretrained=True, num_classes=0)(resized)
        torch.testing.assert_close(backbone((pixels - mean) / std), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_pretrained_are_the_seeds_own() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (timm_backbone(NETWORK, prototype_stream(), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.fc1.weight"], other["model.fc1.weight"])


def test_adapters_learn_and_what_is_frozen_stands_still() -> None:
    stream = prototype_stream(channels=3, side=6, per_class=8)
    learner = TorchLearner(timm_backbone(NETWORK, stream, seed=0), stream)
    before = learner.parameters()
    training = Training(
        *(Annealed(0.1, 1), Annealed(0.1, 1)), batch_size=9, adaptation=Adaptation(rank=2, layers=("*.fc1", "*.fc2"))
    )
    record = learn(learner, stream, build_method("became", {"threshold": 0.7}), training)
    after = learner.parameters()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {"model.fc1.weight", "model.fc2.weight"}
    assert changed == adapted | {f"heads.{task}.weight" for task in range(3)}
    assert [set(ranks) for ranks in record.ranks] == [adapted] * 3


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("huge", False, r"the network 'huge' of timm cannot be made: Unknown model \(huge\)\.$"),
        ("tiny.weightless", True, "the network 'tiny.weightless' of timm cannot be made: No pretrained weights"),
    ],
)
def test_a_network_that_timm_does_not_have_is_refused_in_a_sentence(name: str, pretrained: bool, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        timm_backbone(HubNetwork(name, pretrained, "timm"), prototype_stream(), seed=0)


def test_text_is_refused() -> None:
    with pytest.raises(BecameError, match="'tiny' of timm reads images, not text"):
        timm_backbone(NETWORK, text_stream(), seed=0)


def test_names_say_that_a_network_is_of_timm() -> None:
    assert hub_network("timm:hf-hub:timm/tiny", pretrained=True) == HubNetwork("hf-hub:timm/tiny", True, "timm")
    with pytest.raises(BecameError, match="'timm:' is followed by no name; give a name that timm knows"):
        hub_network("timm:")


def test_the_command_learns_with_a_network_of_timm_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.cli.main import main
    from adapters.torch.run import BACKEND

    words = ["--benchmark", "split-mnist", "--first", "2", "--epochs", "1", "--batch-size", "100", "--quiet"]
    words += ["--methods", "gpm", "--network", "timm:tiny", "--freeze", "*patch_embed*", "--out", str(tmp_path)]
    assert main(BACKEND, [*words, "--pretrained"]) == 0
    config = json.loads((tmp_path / "gpm-seed0" / "config.json").read_text())["config"]
    assert (config["network"], config["pretrained"]) == ("timm:tiny", True)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(BACKEND, [*words, "--seeds", "1"]) == 2
    said = capsys.readouterr().err
    assert "the package 'timm' is missing; pip install 'became[timm]'." in said
    assert "Traceback" not in said


def test_a_timm_that_does_not_load_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a PyTorch that it was not built for, torchvision fails with a RuntimeError and not with an ImportError."""
    from adapters.cli.main import main
    from adapters.torch.run import BACKEND

    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.delitem(sys.modules, "timm.data")
    words = [
        "--benchmark",
        "split-mnist",
        "--methods",
        "gpm",
        "--network",
        "timm:tiny",
        "--out",
        str(tmp_path / "runs"),
    ]
    assert main(BACKEND, words) == 2
    said = capsys.readouterr().err
    assert "the package 'timm' cannot be imported: operator torchvision::nms does not exist; it needs a " in said
    assert "Traceback" not in said
