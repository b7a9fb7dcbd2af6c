"""What is written loads with ``transformers``, ``peft`` and ``safetensors``, and gives the outputs of the merge."""

from pathlib import Path
from typing import Any

import pytest

from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints
from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
from adapters.checkpoints.fisher_inputs import load_model, read_samples

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

try:
    transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel  # noqa: B018 # loaded only now
except Exception as error:  # whatever its own requirements lead it to
    pytest.skip(f"transformers does not load here: {error}", allow_module_level=True)

# What they say of themselves is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
VOCABULARY = 19


def config(kind: str, *, tied: bool) -> Any:
    if kind == "llama":
        return transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied,
        )  # fmt: skip
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=tied,
    )  # fmt: skip


def model(place: Path, seed: int, kind: str, *, tied: bool, dtype: Any = None) -> Path:
    torch.manual_seed(seed)
    network = transformers.AutoModelForCausalLM.from_config(config(kind, tied=tied))
    for parameter in network.parameters():  # away from the common initial values
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.to(dtype or torch.float32).save_pretrained(place)
    return place


def loaded(place: Path) -> Any:
    network, info = transformers.AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return network.eval()


def outputs(network: Any) -> Any:
    with torch.no_grad():
        return network(torch.arange(10)[None] % VOCABULARY).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", [5 * 10**9, 1500])
def test_a_merged_model_loads_with_transformers(tmp_path: Path, kind: str, tied: bool, shard_size: int) -> None:
    places = [model(tmp_path / name, k, kind, tied=tied) for k, name in enumerate("AB")]
    plan = MergePlan(tuple(map(PlannedModel, places)), "linear", shard_size=shard_size)
    report = merge_checkpoints(plan, tmp_path / "out")
    assert (len(report.files) > 1) == (shard_size < 10**6)
    merged, first, second = loaded(tmp_path / "out"), loaded(places[0]), loaded(places[1])
    expected = {name: (value + second.state_dict()[name]) / 2 for name, value in first.state_dict().items()}
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    first.load_state_dict(expected)
    torch.testing.assert_close(outputs(merged), outputs(first))


def test_a_tied_and_an_untied_model_make_an_untied_one(tmp_path: Path) -> None:
    first = model(tmp_path / "A", 0, "llama", tied=True)
    second = model(tmp_path / "B", 1, "llama", tied=False)
    merge_checkpoints(MergePlan((PlannedModel(first), PlannedModel(second)), "linear"), tmp_path / "out")
    merged, one, other = loaded(tmp_path / "out"), loaded(first), loaded(second)
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(merged.lm_head.weight, (one.lm_head.weight + other.lm_head.weight) / 2)
    embeddings = [network.model.embed_tokens.weight for network in (merged, one, other)]
    torch.testing.assert_close(embeddings[0], (embeddings[1] + embeddings[2]) / 2)


def test_bfloat16_stays_bfloat16_and_another_dtype_is_in_the_configuration(tmp_path: Path) -> None:
    places = [model(tmp_path / name, k, "llama", tied=False, dtype=torch.bfloat16) for k, name in enumerate("AB")]
    plan = MergePlan(tuple(map(PlannedModel, places)), "linear")
    merge_checkpoints(plan, tmp_path / "out")
    merge_checkpoints(plan.replaced(out_dtype="float16"), tmp_path / "half")
    for name, dtype in (("out", torch.bfloat16), ("half", torch.float16)):
        assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").dtype == dtype


def test_fisher_of_a_language_model_and_its_merge(tmp_path: Path) -> None:
    places = [model(tmp_path / name, k, "llama", tied=False) for k, name in enumerate("AB")]
    models = []
    for k, place in enumerate(places):
        network, tokenizer = load_model(place, None)
        assert tokenizer is None
        samples = read_samples(f"random:6x8x{VOCABULARY}", seed=k)
        fisher_from_data(place, samples, tmp_path / f"F{k}.safetensors", FisherRequest(chunk=3), network)
        models.append(PlannedModel(place, fisher=tmp_path / f"F{k}.safetensors"))
        # One sample by hand.
        network.zero_grad()
        logits = network(torch.from_numpy(samples.inputs[:1].copy())).logits
        torch.nn.functional.cross_entropy(
            logits[0], torch.from_numpy(samples.targets[0].copy()), reduction="sum"
        ).backward()
        one = tmp_path / f"one{k}.safetensors"
        fisher_from_data(place, samples, one, FisherRequest(samples=1), network)
        from safetensors.torch import load_file

        for name, value in load_file(one).items():
            square = dict(network.named_parameters())[name].grad ** 2
            torch.testing.assert_close(value, square, rtol=1e-3, atol=1e-8)
    report = merge_checkpoints(MergePlan(tuple(models), per="layer"), tmp_path / "out")
    assert isinstance(report.alpha, dict)
    assert {"model.layers.0", "model.layers.1", "lm_head"} <= report.alpha.keys()
    loaded(tmp_path / "out")


@pytest.mark.parametrize("rank", [None, 3])
def test_a_merged_adapter_loads_with_peft(tmp_path: Path, rank: int | None) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    base = model(tmp_path / "base", 0, "llama", tied=False)
    places = []
    ranks: list[dict[str, Any]] = [{"r": 2}]
    ranks.append({"r": 4, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.v_proj": 3}})
    for k, options in enumerate(ranks):
        torch.manual_seed(10 + k)
        words = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=6, init_lora_weights=False, **options)
        network = peft.get_peft_model(loaded(base), words)
        network.save_pretrained(tmp_path / f"adapter{k}")
        places.append(tmp_path / f"adapter{k}")
    models = (PlannedModel(places[0], 0.25), PlannedModel(places[1], 0.75))
    report = merge_checkpoints(MergePlan(models, "linear", rank=rank), tmp_path / "out")

    def weights(adapter: Path) -> Any:
        return peft.PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload().state_dict()

    start, first, second, merged = (
        loaded(base).state_dict(),
        weights(places[0]),
        weights(places[1]),
        weights(tmp_path / "out"),
    )
    for name, value in merged.items():
        change = 0.25 * (first[name] - start[name]) + 0.75 * (second[name] - start[name])
        error = float((value - start[name] - change).norm())
        module = name.removesuffix(".weight")
        allowed = report.errors.get(module, 0.0) * float(change.norm())
        assert error == pytest.approx(allowed, rel=1e-3, abs=1e-5)
    assert bool(report.errors) == (rank is not None)
