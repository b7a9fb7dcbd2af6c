"""Networks of Hugging Face's hub as backbones: what they compute, what is refused, and a run of the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.networks import HubNetwork, hub_network
from adapters.torch.hub import hub_backbone
from adapters.torch.learner import TorchLearner
from became_core import BecameError
from became_core.continual import Adaptation, Annealed, TaskStream, Training, build_method, learn
from tests.streams import drifting_stream, prototype_stream, text_stream

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CONFIGS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTConfig(image_size=12, patch_size=4, **SMALL),
    "convnext": lambda: transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], patch_size=2, image_size=8
    ),
    "siglip": lambda: transformers.SiglipVisionConfig(image_size=12, patch_size=4, **SMALL),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=2),
    "bert": lambda: transformers.BertConfig(vocab_size=256, max_position_embeddings=16, **SMALL),
    "words": lambda: transformers.GPT2Config(vocab_size=500, n_positions=16, n_embd=8, n_layer=1, n_head=2),
    "few": lambda: transformers.GPT2Config(vocab_size=90, n_positions=16, n_embd=8, n_layer=1, n_head=2),
    "short": lambda: transformers.GPT2Config(vocab_size=256, n_positions=3, n_embd=8, n_layer=1, n_head=2),
    "t5": lambda: transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
    "speech": lambda: transformers.Wav2Vec2Config(**SMALL, num_conv_pos_embedding_groups=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that makes a folder of a network, with weights and, for one, what images it knows."""
    root = tmp_path_factory.mktemp("hub")

    def made(name: str) -> str:
        target = root / name
        if not target.exists():
            torch.manual_seed(7)
            transformers.AutoModel.from_config(CONFIGS[name]()).save_pretrained(target)
            if name == "vit":
                about = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.4] * 3}
                (target / "preprocessor_config.json").write_text(json.dumps(about))
        return str(target)

    return made


def images(stream: TaskStream) -> torch.Tensor:
    pixels = torch.from_numpy(stream.dataset.images[:4].astype(np.float32))
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (stream.dataset.mean, stream.dataset.std))
    return (pixels - mean) / std


def test_pretrained_weights_see_the_images_that_they_know(folder: Callable[[str], str]) -> None:
    stream = prototype_stream(channels=1, side=6)
    backbone = hub_backbone(HubNetwork(folder("vit"), pretrained=True), stream, seed=0).eval()
    model = transformers.AutoModel.from_pretrained(folder("vit")).eval()
    pixels = torch.from_numpy(stream.dataset.images[:4] / np.float32(255)).expand(-1, 3, -1, -1)
    resized = torch.nn.functional.interpolate((pixels - 0.1) / 0.4, (12, 12), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = model(pixel_values=resized).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone(images(stream)), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_pretrained_are_the_seeds_own(folder: Callable[[str], str]) -> None:
    stream, network = prototype_stream(channels=3), HubNetwork(folder("convnext"))
    before = torch.random.get_rng_state()
    first, same, other = (hub_backbone(network, stream, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    drawn = [name for name in first if not torch.equal(first[name], other[name])]
    assert drawn
    assert all(torch.equal(first[name], same[name]) for name in first)


def test_features_of_a_network_without_a_class_token_are_means_over_places(folder: Callable[[str], str]) -> None:
    stream = prototype_stream(channels=3, side=12)
    backbone = hub_backbone(HubNetwork(folder("siglip")), stream, seed=0).eval()
    hidden = backbone.model(images(stream)).last_hidden_state
    torch.testing.assert_close(backbone(images(stream)), hidden.mean(1))


def test_weights_that_a_file_lacks_are_refused_and_not_drawn(folder: Callable[[str], str], tmp_path: Path) -> None:
    weights = load_file(Path(folder("vit")) / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(folder("vit")) / "config.json").read_text())
    target = tmp_path / "model.safetensors"
    save_file(
        {name: value for name, value in weights.items() if not name.startswith("pooler")}, target, {"format": "pt"}
    )
    hub_backbone(HubNetwork(str(tmp_path), pretrained=True), prototype_stream(channels=3, side=12), seed=0)
    first = next(name for name in sorted(weights) if name.startswith("encoder"))
    save_file({name: value for name, value in weights.items() if name != first}, target, {"format": "pt"})
    with pytest.raises(BecameError, match=r"lack '.*' \(1 in all\); give weights of this"):
        hub_backbone(HubNetwork(str(tmp_path), pretrained=True), prototype_stream(channels=3, side=12), seed=0)
    target.write_bytes(b"no weights")
    with pytest.raises(BecameError, match="cannot be read") as refused:
        hub_backbone(HubNetwork(str(tmp_path), pretrained=True), prototype_stream(channels=3, side=12), seed=0)
    assert "\n" not in str(refused.value)


def test_features_of_a_convolutional_network_are_means_over_places(folder: Callable[[str], str]) -> None:
    stream = prototype_stream(channels=3, side=8)
    backbone = hub_backbone(HubNetwork(folder("convnext")), stream, seed=0).eval()
    with torch.no_grad():
        hidden = backbone.model(images(stream)).last_hidden_state
        torch.testing.assert_close(backbone(images(stream)), hidden.mean((2, 3)))


def test_text_has_features_at_each_position_or_one_of_the_whole(folder: Callable[[str], str]) -> None:
    stream = text_stream()
    text = torch.from_numpy(stream.dataset.images[:4]).long()
    gpt2 = hub_backbone(HubNetwork(folder("gpt2")), stream, seed=0).eval()
    with torch.no_grad():
        hidden = gpt2.model(text).last_hidden_state
        torch.testing.assert_close(gpt2(text), hidden)
        gpt2.per_position = False
        torch.testing.assert_close(gpt2(text), hidden[:, -1])
        bert = hub_backbone(HubNetwork(folder("bert")), rated_text(), seed=0).eval()
        torch.testing.assert_close(bert(text), bert.model(text).last_hidden_state.mean(1))


def rated_text() -> TaskStream:
    from dataclasses import replace

    from became_core.continual import split_domains
    from became_core.curvature import Gaussian

    letters = text_stream().dataset
    ratings = letters.images.mean(1, keepdims=True)
    return split_domains(replace(letters, labels=ratings, likelihood=Gaussian()), validation=0.0)


@pytest.mark.parametrize(
    ("name", "stream", "pretrained", "message"),
    [
        ("bert", text_stream, False, "sees the byte that it is to predict"),
        ("words", text_stream, True, "know 500 tokens of a tokenizer"),
        ("few", text_stream, False, "knows 90 tokens"),
        ("short", text_stream, False, r"cannot take samples \[6\]"),
        ("vit", text_stream, False, "reads pixel_values, not text"),
        ("gpt2", drifting_stream, False, "reads input_ids, not images"),
        ("speech", prototype_stream, False, "reads input_values, not images"),
        ("t5", text_stream, False, "an encoder with a decoder"),
    ],
)
def test_what_cannot_learn_these_samples_is_refused_in_a_sentence(
    folder: Callable[[str], str], name: str, stream: Callable[[], TaskStream], pretrained: bool, message: str
) -> None:
    with pytest.raises(BecameError, match=message) as refused:
        hub_backbone(HubNetwork(folder(name), pretrained), stream(), seed=0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [KeyError("pixels"), TypeError("no such argument")])
def test_whatever_a_network_raises_on_its_first_samples_is_one_sentence(
    folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.ViTModel, "forward", fails)
    with pytest.raises(BecameError, match=r"cannot take samples \[3, 12, 12\]"):
        hub_backbone(HubNetwork(folder("vit")), prototype_stream(channels=3, side=12), seed=0)


def test_adapters_of_the_attention_learn_and_all_else_of_the_network_stands_still(folder: Callable[[str], str]) -> None:
    stream = prototype_stream(channels=3, side=12, per_class=8)
    learner = TorchLearner(hub_backbone(HubNetwork(folder("vit")), stream, seed=0), stream)
    before = learner.parameters()
    queries = [name for name in before if "q_proj.weight" in name or "query.weight" in name]
    assert len(queries) == 1
    adaptation = Adaptation(rank=2, layers=(f"*{queries[0].split('.')[-2]}",))
    training = Training(Annealed(0.1, 1), Annealed(0.1, 1), batch_size=9, adaptation=adaptation)
    record = learn(learner, stream, build_method("became", {"threshold": 0.7}), training)
    after = learner.parameters()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [*queries, *(f"heads.{task}.weight" for task in range(3))]
    assert [set(ranks) for ranks in record.ranks] == [set(queries)] * 3


def test_a_folder_without_a_network_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BecameError, match="cannot be read") as refused:
        hub_backbone(HubNetwork(str(tmp_path / "nothing")), prototype_stream(), seed=0)
    assert "\n" not in str(refused.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BecameError, match="cannot be read"):
        hub_backbone(HubNetwork(str(tmp_path)), prototype_stream(), seed=0)


def test_names_say_whether_a_network_is_one_of_the_hub() -> None:
    assert hub_network("hf:a/b", pretrained=True) == HubNetwork("a/b", pretrained=True)
    assert hub_network("mlp") is None
    for name, norm, pretrained, message in (
        ("hf:", "batch", False, "followed by no name"),
        ("hf:a", "group", False, "norms of its own"),
        ("mlp", "batch", True, "no pretrained weights of 'mlp'"),
        ("hg:a", "batch", False, "there is no network 'hg:a'"),
    ):
        with pytest.raises(BecameError, match=message):
            hub_network(name, norm, pretrained=pretrained)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "make"), [("vit", prototype_stream), ("gpt2", text_stream)])
def test_both_stages_and_the_merge_work_on_a_network_of_the_hub(
    folder: Callable[[str], str], name: str, make: Callable[[], TaskStream]
) -> None:
    stream = make()
    backbone = hub_backbone(HubNetwork(folder(name), pretrained=True), stream, seed=0)
    training = Training(Annealed(0.05, 2), Annealed(0.05, 1), batch_size=16)
    record = learn(TorchLearner(backbone, stream), stream, build_method("became"), training, seed=0)
    assert all(0 <= alpha <= 1 for alpha in record.alpha if alpha is not None)
    protected = {weight for ranks in record.ranks for weight in ranks}
    assert any("attention" in weight or "attn" in weight for weight in protected)


def test_matrices_that_are_stored_as_inputs_by_outputs_are_protected_too(folder: Callable[[str], str]) -> None:
    backbone = hub_backbone(HubNetwork(folder("gpt2"), pretrained=True), text_stream(), seed=0).eval()
    model = transformers.AutoModel.from_pretrained(folder("gpt2")).eval()
    text = torch.from_numpy(text_stream().dataset.images[:4]).long()
    with torch.no_grad():
        torch.testing.assert_close(backbone(text), model(text).last_hidden_state)
    learner = TorchLearner(backbone, text_stream())
    matrices = {name for name, value in learner.parameters().items() if value.ndim == 2 and ".h." in name}
    assert matrices
    assert matrices <= learner.projectable


def test_the_command_learns_with_a_network_of_the_hub(
    folder: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from adapters.cli.__main__ import main

    words = ["run", "--benchmark", "split-mnist", "--first", "2", "--epochs", "1", "--stage2-epochs", "1", "--quiet"]
    words += ["--methods", "gpm", "--network", f"hf:{folder('vit')}", "--out", str(tmp_path / "runs")]
    assert main([*words, "--backend", "torch", "--pretrained"]) == 0
    config = json.loads((tmp_path / "runs" / "gpm-seed0" / "config.json").read_text())
    assert config["config"]["pretrained"] is True
    capsys.readouterr()
    assert main([*words, "--backend", "torch", "--network", f"hf:{tmp_path}/none"]) == 2
    assert "Traceback" not in capsys.readouterr().err
