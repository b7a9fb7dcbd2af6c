"""Every format is read, and what does not fit together is refused in a sentence that names file and tensor."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints, open_checkpoint, resources
from adapters.checkpoints.digest import digest_of
from became_core import BecameError
from tests.checkpoints.models import SHAPES, Arrays, arrays, merged, pair, saved

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def folder_of(place: Path, values: Arrays, *, shards: int = 1, config: Any = None) -> Path:
    """A folder as Hugging Face models have it."""
    place.mkdir()
    names = list(values)
    if shards == 1:
        save_file(values, place / "model.safetensors")
    else:
        weight_map = {name: f"model-{k % shards + 1:05d}-of-{shards:05d}.safetensors" for k, name in enumerate(names)}
        for shard in set(weight_map.values()):
            save_file({name: values[name] for name in names if weight_map[name] == shard}, place / shard)
        index = {"metadata": {}, "weight_map": weight_map}
        (place / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    if config is not None:
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def refused(plan: MergePlan, out: Path, message: str) -> None:
    """The merge is refused with a sentence, and leaves nothing."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(BecameError, match=message) as error:
        merge_checkpoints(plan, out)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.rglob("*")) == before


def linear(*models: Path, **options: Any) -> MergePlan:
    return MergePlan(tuple(map(PlannedModel, models)), "linear", **options)


@pytest.mark.parametrize("kind", ["safetensors", "folder", "shards", "npz", "npz-compressed"])
def test_every_format_of_numpy_gives_the_same_tensors(tmp_path: Path, kind: str) -> None:
    values = arrays(0)
    makers: dict[str, Callable[[], Path]] = {
        "safetensors": lambda: saved(tmp_path, "A", values),
        "folder": lambda: folder_of(tmp_path / "A", values, config={}),
        "shards": lambda: folder_of(tmp_path / "A", values, shards=3),
        "npz": lambda: (np.savez(tmp_path / "A.npz", **values), tmp_path / "A.npz")[1],  # type: ignore[func-returns-value, arg-type]
        "npz-compressed": lambda: (np.savez_compressed(tmp_path / "A.npz", **values), tmp_path / "A.npz")[1],  # type: ignore[func-returns-value, arg-type]
    }
    checkpoint = open_checkpoint(makers[kind]())
    assert checkpoint.tensors.keys() == values.keys()
    for name, tensor in checkpoint.tensors.items():
        assert_array_equal(tensor.whole(), values[name])
        if tensor.size > 3:
            assert_array_equal(tensor.slab(1, 3), values[name].reshape(-1)[1:3])
    assert digest_of(checkpoint) == digest_of(open_checkpoint(saved(tmp_path, "same", values)))
    assert digest_of(checkpoint) != digest_of(open_checkpoint(saved(tmp_path, "other", arrays(1))))


def test_a_digest_is_the_same_in_every_version(tmp_path: Path) -> None:
    # Fisher files name their model by it, so that it must never change.
    assert digest_of(open_checkpoint(saved(tmp_path, "A", arrays(0)))) == "b0a99dcaebd6f6de2579c948918c0de6"


@pytest.mark.parametrize("save", ["state_dict", "nested", "old"])
def test_a_pytorch_file_is_read_as_weights_alone(tmp_path: Path, save: str) -> None:
    torch = pytest.importorskip("torch")
    values = {name: torch.from_numpy(value.copy()).to(torch.bfloat16) for name, value in arrays(0).items()}
    file = tmp_path / "A.pt"
    torch.save({"state_dict": values, "epoch": 3} if save == "nested" else values, file,
               _use_new_zipfile_serialization=save != "old")  # fmt: skip
    checkpoint = open_checkpoint(file)
    for name, value in arrays(0).items():
        assert_array_equal(checkpoint.tensors[name].whole(), value.astype(ml_dtypes.bfloat16))
    same = saved(tmp_path, "same", {name: value.astype(ml_dtypes.bfloat16) for name, value in arrays(0).items()})
    assert digest_of(checkpoint) == digest_of(open_checkpoint(same))


def test_a_pytorch_file_that_would_execute_something_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("executed",))

    torch.save({"w": Evil()}, tmp_path / "A.pt")
    with pytest.raises(BecameError, match=r"A\.pt is no PyTorch file of weights alone") as error:
        open_checkpoint(tmp_path / "A.pt")
    assert "weights_only" not in str(error.value)  # PyTorch's own sentence says how to execute it


def test_a_pytorch_tensor_in_another_order_is_read_by_rows(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    images = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"w": images, "t": torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3).T, "s": torch.tensor(2.0)}
    torch.save(state, tmp_path / "A.pt")
    tensors = open_checkpoint(tmp_path / "A.pt").tensors
    assert_array_equal(tensors["w"].whole(), np.arange(120.0).reshape(2, 3, 4, 5))
    assert_array_equal(tensors["w"].slab(50, 70), np.arange(50.0, 70.0))
    assert_array_equal(tensors["t"].slab(1, 5).astype(float), [3.0, 1.0, 4.0, 2.0])
    assert_array_equal(tensors["s"].whole(), 2.0)


def test_a_pytorch_tensor_whose_numbers_are_not_all_stored_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    cases = [
        ({"w": torch.empty(3, device="meta")}, "'w' of .* is no dense tensor in memory"),
        ({"w": torch.eye(3).to_sparse()}, "'w' of .* is no dense tensor in memory"),
        ({"w": torch.ones(1).expand(10**6, 10**6)}, "'w' of .* is expanded"),
        ({1: torch.ones(2), "1": torch.zeros(2)}, "has '1' twice"),
    ]
    for content, message in cases:
        torch.save(content, tmp_path / "A.pt")
        refused(linear(tmp_path / "A.pt", tmp_path / "A.pt"), tmp_path / "out", message)


def test_tensors_that_share_memory_are_written_once(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    files = []
    for k in range(2):
        values = {name: torch.from_numpy(value.copy()) for name, value in arrays(k).items()}
        values[HEAD] = values[EMBEDDING]
        torch.save(values, tmp_path / f"{k}.bin")
        files.append(tmp_path / f"{k}.bin")
    merge_checkpoints(linear(*files), tmp_path / "out")
    assert merged(tmp_path / "out").keys() == SHAPES.keys() - {HEAD}


def test_heads_that_all_models_tie_are_written_once(tmp_path: Path) -> None:  # mergekit 385, 390
    config = {"tie_word_embeddings": True}
    both = arrays(0) | {HEAD: arrays(0)[EMBEDDING]}
    one = {name: value for name, value in arrays(1).items() if name != HEAD}
    models = folder_of(tmp_path / "A", both, config=config), folder_of(tmp_path / "B", one, config=config)
    merge_checkpoints(linear(*models), tmp_path / "out")
    assert merged(tmp_path / "out").keys() == SHAPES.keys() - {HEAD}
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == config


@pytest.mark.parametrize("config", [None, {"vocab_size": 7}])
def test_a_head_that_no_model_says_to_be_tied_stays(tmp_path: Path, config: Any) -> None:
    # Such a model may be untied by default, as Llama is, and would be loaded without a head.
    both = [
        folder_of(tmp_path / n, arrays(k) | {HEAD: arrays(k)[EMBEDDING]}, config=config) for k, n in enumerate("AB")
    ]
    merge_checkpoints(linear(*both), tmp_path / "out")
    out = merged(tmp_path / "out")
    assert_array_equal(out[HEAD], out[EMBEDDING])


def test_a_head_that_one_model_ties_is_read_from_its_embedding(tmp_path: Path) -> None:  # mergekit 464, 615
    tied = {name: value for name, value in arrays(0).items() if name != HEAD}
    models = (
        folder_of(tmp_path / "A", tied, config={"tie_word_embeddings": True}),
        folder_of(tmp_path / "B", arrays(1), config={"tie_word_embeddings": False}),
    )
    merge_checkpoints(linear(*models), tmp_path / "out")
    out = merged(tmp_path / "out")
    assert_allclose(out[HEAD], (arrays(0)[EMBEDDING] + arrays(1)[HEAD]) / 2, atol=1e-6)
    assert_allclose(out[EMBEDDING], (arrays(0)[EMBEDDING] + arrays(1)[EMBEDDING]) / 2, atol=1e-6)
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written == {"tie_word_embeddings": False}


def test_vocabularies_of_two_sizes_are_refused_with_the_sizes(tmp_path: Path) -> None:  # mergekit 47, 139, 342, 425
    longer = arrays(1) | {name: np.ones((9, 6), np.float32) for name in (EMBEDDING, HEAD)}
    models = saved(tmp_path, "A", arrays(0)), saved(tmp_path, "B", longer)
    refused(
        linear(*models), tmp_path / "out", r"vocabularies differ: '.*' of .*B.* has 9 rows, that of .*A.* has 7; --pad"
    )


def test_padding_takes_missing_rows_from_the_models_that_have_them(tmp_path: Path) -> None:
    longer = arrays(1) | {name: np.full((9, 6), 2.0, np.float32) for name in (EMBEDDING, HEAD)}
    models = (
        folder_of(tmp_path / "A", arrays(0), config={"vocab_size": 7, "tie_word_embeddings": False}),
        folder_of(tmp_path / "B", longer, config={"vocab_size": 9, "tie_word_embeddings": False}),
    )
    merge_checkpoints(linear(*models, pad_vocabulary=True), tmp_path / "out")
    out = merged(tmp_path / "out")[EMBEDDING]
    assert_allclose(out[:7], (arrays(0)[EMBEDDING] + 2.0) / 2, atol=1e-6)
    assert_array_equal(out[7:], 2.0)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 9
    fishers = [
        saved(tmp_path, "FA", arrays(10, positive=True)),
        saved(tmp_path, "FB", {n: np.ones(v.shape, np.float32) for n, v in longer.items()}),
    ]
    planned = tuple(PlannedModel(model, fisher=fisher) for model, fisher in zip(models, fishers, strict=True))
    report = merge_checkpoints(MergePlan(planned, pad_vocabulary=True, per="leaf"), tmp_path / "became")
    assert isinstance(report.alpha, dict)
    alpha = report.alpha[EMBEDDING]
    delta, old = 2.0 - arrays(0)[EMBEDDING].astype(float), arrays(10, positive=True)[EMBEDDING]
    assert alpha == pytest.approx((delta**2).sum() / ((old + 1) * delta**2).sum(), rel=1e-5)


def test_models_that_are_no_language_models_merge_too(tmp_path: Path) -> None:  # mergekit 159, 423, 461
    def convnet(seed: int) -> Arrays:
        values = arrays(seed, {"features.0.weight": (4, 3, 3, 3), "features.1.weight": (4,), "classifier.bias": (2,)})
        values["features.1.running_mean"] = np.full(4, float(seed), np.float32)
        values["features.1.running_var"] = np.full(4, 1.0 + seed, np.float32)
        values["features.1.num_batches_tracked"] = np.asarray(100 + seed)
        return values

    models = []
    for k in range(2):
        fisher = {n: v**2 + 0.1 for n, v in convnet(k).items() if "running" not in n and "num_batches" not in n}
        models.append(PlannedModel(saved(tmp_path, f"M{k}", convnet(k)), fisher=saved(tmp_path, f"F{k}", fisher)))
    report = merge_checkpoints(MergePlan(tuple(models)), tmp_path / "out")
    out = merged(tmp_path / "out")
    assert out["features.1.num_batches_tracked"] == 100
    assert isinstance(report.alpha, float)
    np.testing.assert_allclose(out["features.1.running_mean"], report.alpha, rtol=1e-6)
    assert any("num_batches_tracked" in note for note in report.notes)
    assert any("estimate them anew" in note for note in report.notes)


def test_companions_are_copied_from_the_base(tmp_path: Path) -> None:
    models = [folder_of(tmp_path / name, arrays(k), config={"name": name}) for k, name in enumerate("AB")]
    for name in ("tokenizer.json", "generation_config.json", "merges.txt"):
        for model in models:
            (model / name).write_text(f"{model.name} {name}", encoding="utf-8")
    (models[1] / "README.md").write_text("not this", encoding="utf-8")
    (models[1] / "trainer_state.json").write_text("{}", encoding="utf-8")
    merge_checkpoints(linear(models[0], base_model=models[1]), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8") == "B tokenizer.json"
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert (tmp_path / "out" / "merges.txt").exists()
    assert "not this" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def changed(seed: int, **changes: Any) -> Arrays:
    values = arrays(seed)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del values[name]
        else:
            values[name] = value
    return values


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (changed(1, model__norm__weight=None), r"'model.norm.weight' is in .*A.* but not in .*B"),
        (changed(1, extra=np.ones(2)), r"'extra' is in .*B.* but not in .*A"),
        (changed(1, model__layers__0__mlp__weight=np.ones((5, 6), np.float32)), r"weight' of .*B.* has shape \[5, 6\]"),
        (changed(1, model__layers__1__mlp__bias=np.arange(6)), r"bias' of .*B.* has dtype I64, but that of .*A.* F32"),
        (changed(1, model__layers__1__mlp__bias=np.full(6, np.nan, np.float32)), r"bias' of .*B.* infinite or not"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_by_file_and_tensor(tmp_path: Path, second: Arrays, message: str) -> None:
    refused(linear(saved(tmp_path, "A", arrays(0)), saved(tmp_path, "B", second)), tmp_path / "out", message)


def test_integers_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    models = [saved(tmp_path, name, arrays(0) | {"ids": np.arange(5) + k}) for k, name in enumerate("AB")]
    refused(linear(*models), tmp_path / "out", r"'ids' of .*B.* holds integers \(I64\) that differ")
    merge_checkpoints(linear(models[0], models[0]), tmp_path / "out")
    assert_array_equal(merged(tmp_path / "out")["ids"], np.arange(5))


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    values = {"w": np.ones(4, ml_dtypes.float8_e4m3fn), "w_scale": np.ones((), np.float32)}
    file = tmp_path / "A.safetensors"
    save_file({"w": values["w"].view(np.uint8), "w_scale": values["w_scale"]}, file)
    file.write_bytes(file.read_bytes().replace(b'"U8"', b'"F8_E4M3"').replace(b"    ", b"", 1))
    content = file.read_bytes()
    length = content.index(b"}}") + 2 - 8
    file.write_bytes(struct.pack("<Q", length) + content[8 : 8 + length] + content[-8:])
    refused(linear(file, file), tmp_path / "out", r"'w' of .*A.* is quantised with a scale \('w_scale'\)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f | {"lm_head.weight": -f["lm_head.weight"]}, r"'lm_head.weight' of .*FB.* negative"),
        (lambda f: f | {"lm_head.weight": f["lm_head.weight"] * np.nan}, r"'lm_head.weight' of .*FB.* not a number"),
        (lambda f: {n: np.zeros_like(v) for n, v in f.items()}, r"FB.* is zero in all tensors"),
        (lambda f: {n: v for n, v in f.items() if n != "lm_head.weight"}, r"FB.* has no 'lm_head.weight'"),
        (lambda f: f | {"other": np.ones(1, np.float32)}, r"'other' is in .*FB.* but not in its model"),
        (lambda f: f | {"lm_head.weight": np.ones((6, 7), np.float32)}, r"has shape \[6, 7\]"),
        (lambda f: f | {"lm_head.weight": np.ones((7, 6), np.int32)}, r"has dtype I32"),
    ],
)
@pytest.mark.parametrize("method", ["became", "fisher"])
def test_a_fisher_file_that_cannot_be_one_is_refused(tmp_path: Path, change: Any, message: str, method: str) -> None:
    plan = pair(tmp_path, merge_method=method)
    saved(tmp_path, "FB", change(arrays(11, positive=True)))
    refused(plan, tmp_path / "out", message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"unit": "sum"}, "has unit 'mean' and .* has 'sum'"),
        ({"per": "token"}, "has per 'sample' and .* has 'token'"),
        ({"kind": "adam"}, "has kind 'empirical' and .* has 'adam'"),
        ({"model": "0" * 32}, "FB.* was measured at another model than .*B"),
        ({"became.fisher": "2"}, "of format '2'"),
        ({"unit": "median"}, "has unit 'median'"),
        ({"samples": "-1"}, "'-1' as its number of samples"),
    ],
)
@pytest.mark.parametrize("method", ["became", "fisher"])
def test_fisher_files_of_different_kinds_are_not_mixed(tmp_path: Path, words: Any, message: str, method: str) -> None:
    plan = pair(tmp_path, merge_method=method)
    usual = {"became.fisher": "1", "kind": "empirical", "unit": "mean", "per": "sample"}
    saved(tmp_path, "FA", arrays(10, positive=True), usual)
    saved(tmp_path, "FB", arrays(11, positive=True), usual | words)
    refused(plan, tmp_path / "out", message)


def header(entries: Any, content: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + content


def entry(*offsets: int, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too few"),
        (struct.pack("<Q", 2**63), "claims a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 100) + b"{}", "claims a header of 100 bytes"),
        (header(b"[" * 100_000), "is not valid JSON"),
        (header(b'{"w": ' + b"9" * 5000 + b"}"), "is not valid JSON|not just a dtype"),
        (header([]), "is no object"),
        (header(b'{"w": 1, "w": 2}'), "has 'w' twice"),
        (header({"w": entry(0, 4)}), "offsets that lie outside"),
        (header({"w": entry(0, 4), "v": entry(0, 4)}, b"0000"), "overlaps the tensor before it"),
        (header({"w": entry(0, 4), "v": entry(8, 12)}, b"0" * 12), "leaves a hole before it"),
        (header({"w": entry(0, 4)}, b"0" * 8), "8 bytes of tensors but names 4"),
        (header({"w": entry(4, 0)}, b"0" * 4), "offsets that lie outside"),
        (header({"w": entry(0, 4, shape=(2**62, 4))}, b"0" * 4), "shape that does not fit"),
        (header({"w": entry(0, 4, shape=(-1,))}, b"0" * 4), "no list of at most 32 sizes"),
        (header({"w": entry(0, 4, shape=(1,) * 40)}, b"0" * 4), "no list of at most 32 sizes"),
        (header({"w": entry(0, 4, dtype="F4")}, b"0" * 4), "dtype 'F4', which is not known"),
        (header({"w": entry(0, 4, dtype=[])}, b"0" * 4), "which is not known"),
        (header({"w": {**entry(0, 4), "more": 1}}, b"0" * 4), "not just a dtype"),
        (header({"__metadata__": {"a": 1}}), "metadata of .* is not text"),
    ],
)
def test_a_hostile_header_is_refused_in_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "A.safetensors"
    file.write_bytes(content)
    refused(linear(file, saved(tmp_path, "B", arrays(0))), tmp_path / "out", message)


@pytest.mark.parametrize(
    "shard", ["../B.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "C:\\x.safetensors", 3, "config.json"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, shard: Any) -> None:
    saved(tmp_path, "B", arrays(0))
    place = folder_of(tmp_path / "A", arrays(0), shards=2, config={})
    index = {"weight_map": dict.fromkeys(SHAPES, shard)}
    (place / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(linear(place, place), tmp_path / "out", "is no file of weights beside it")


def test_a_missing_shard_and_a_wrong_index_are_refused(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "A", arrays(0), shards=2)
    file = place / "model.safetensors.index.json"
    index = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    file.write_text(json.dumps({"weight_map": {**index, "ghost": index[HEAD]}}), encoding="utf-8")
    refused(linear(place, place), tmp_path / "out", "has 'ghost' in .*, which does not hold it")
    file.write_text(json.dumps({"weight_map": {n: s for n, s in index.items() if n != HEAD}}), encoding="utf-8")
    refused(linear(place, place), tmp_path / "out", r"'lm_head.weight' of .* is not in the index")
    file.write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    (place / "model-00002-of-00002.safetensors").unlink()
    refused(
        linear(place, place), tmp_path / "out", "names the shard model-00002-of-00002.safetensors, which is missing"
    )


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    secret = saved(tmp_path, "secret", arrays(0))
    place = folder_of(tmp_path / "A", arrays(0), config={})
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").symlink_to(secret)
    refused(linear(place, secret), tmp_path / "out", "is a link that leads out of its folder")
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").symlink_to(place / "model.safetensors")
    refused(linear(place, secret), tmp_path / "out", "has no weights|leads nowhere")
    (place / "model.safetensors").unlink()
    save_file(arrays(0), place / "model.safetensors")
    (place / "tokenizer.json").symlink_to("/etc/hostname")
    refused(linear(place, secret), tmp_path / "out", "tokenizer.json is a link that leads out")


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    blobs, place = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    place.mkdir(parents=True)
    save_file(arrays(0), blobs / "abc")
    (place / "model.safetensors").symlink_to(Path("..", "..", "blobs", "abc"))
    assert open_checkpoint(place).tensors.keys() == SHAPES.keys()


def test_archives_that_are_none_are_refused(tmp_path: Path) -> None:
    objects = tmp_path / "A.npz"
    np.savez(objects, w=np.asarray([{}], dtype=object))
    fortran = tmp_path / "B.npz"
    np.savez(fortran, w=np.asfortranarray(np.ones((2, 3))))
    other = tmp_path / "C.npz"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("w.txt", "no array")
    wrong = tmp_path / "D.npz"
    wrong.write_bytes(b"PK no archive")
    for file, message in (
        (objects, "dtype"),
        (fortran, "column by column"),
        (other, "'w.txt', which is no array"),
        (wrong, "no NumPy archive"),
    ):
        refused(linear(file, file), tmp_path / "out", message)


@pytest.mark.parametrize("name", ["A.gguf", "A", "A.txt"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    refused(linear(tmp_path / name, tmp_path / name), tmp_path / "out", "is no checkpoint that is known")
    refused(linear(tmp_path / "missing", tmp_path / name), tmp_path / "out", "there is no .*missing")
    (tmp_path / "empty").mkdir()
    refused(linear(tmp_path / "empty", tmp_path / name), tmp_path / "out", "has no weights")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_pipes_and_devices_which_might_never_end_are_refused(tmp_path: Path, suffix: str) -> None:
    device = tmp_path / f"A{suffix}"
    device.symlink_to("/dev/null")  # which ends, so that this test does
    refused(linear(device, device), tmp_path / "out", "A.* is no file")


def test_what_the_system_does_not_let_us_look_at_is_refused(tmp_path: Path) -> None:
    model, long = saved(tmp_path, "A", arrays(0)), tmp_path / ("x" * 300)
    refused(linear(long, model), tmp_path / "out", "cannot read .*x: File name too long")
    refused(linear(model, model), long, "cannot write .*x: File name too long")


def test_a_name_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "A.safetensors"
    file.write_bytes(header({"\ud800": entry(0, 4)}, b"0000"))
    refused(linear(file, file), tmp_path / "out", r"A.* has a name '\\ud800', which is no text in UTF-8")


def test_a_path_need_not_be_text(tmp_path: Path) -> None:
    model = saved(tmp_path, "A", arrays(0)).rename(tmp_path / os.fsdecode(b"\xff.safetensors"))
    merge_checkpoints(linear(model, model), tmp_path / "out", command=f"became merge {model}")
    assert "\\udcff.safetensors" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "out" / "became_merge.json").read_text(encoding="utf-8"))
    assert report["inputs"]["model 1"]["path"] == str(model)


def test_too_little_memory_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(BecameError, match=r"needs at least .* MiB of memory; give --memory more"):
        merge_checkpoints(pair(tmp_path), tmp_path / "out", memory=1000)
    assert load_file(tmp_path / "A.safetensors").keys() == SHAPES.keys()


def test_what_the_calling_program_holds_is_no_part_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "resident", lambda: 10 * 2**30)  # a framework and a model of its own, say
    merge_checkpoints(pair(tmp_path), tmp_path / "out", memory=256 * 2**20)
    assert (tmp_path / "out" / "model.safetensors").exists()
