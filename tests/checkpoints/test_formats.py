"""Every format is read, and what models have in common is written once."""

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints, open_checkpoint
from adapters.checkpoints.digest import digest_of
from adapters.checkpoints.tensors import SLAB, ranges
from became_core import BecameError
from tests.checkpoints.models import EMBEDDING, HEAD, SHAPES, Arrays, arrays, folder_of, linear, merged, refused, saved


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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_is_one_open_file_however_many_arrays_it_has(tmp_path: Path, save: Any) -> None:
    values = {f"layers.{k}.weight": np.full((3, 2), k, np.float32) for k in range(40)}
    save(tmp_path / "A.npz", **values)
    before = len(list(Path("/proc/self/fd").iterdir()))
    checkpoint = open_checkpoint(tmp_path / "A.npz")
    for name, tensor in checkpoint.tensors.items():
        assert_array_equal(tensor.slab(0, 4), values[name].reshape(-1)[:4])
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 3, 2), (3, 1, 2, 0), (2, 2, 0, 1)])
def test_slabs_of_a_compressed_array_come_in_any_order_and_neighbours_from_one_pass(
    tmp_path: Path, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(3 * SLAB + 5, dtype=np.float32)
    np.savez_compressed(tmp_path / "A.npz", w=values)
    tensor = open_checkpoint(tmp_path / "A.npz").tensors["w"]
    opened, usual = list[str](), zipfile.ZipFile.open

    def counted(self: zipfile.ZipFile, name: Any, *more: Any) -> Any:
        opened.append(str(name))
        return usual(self, name, *more)

    monkeypatch.setattr(zipfile.ZipFile, "open", counted)
    slabs = list(ranges(tensor.size))
    for number in order:
        assert_array_equal(tensor.slab(*slabs[number]), values[slice(*slabs[number])])
    if order == (1, 0, 3, 2):  # as two threads ask for them
        assert len(opened) == 1


def test_an_array_that_is_stored_as_it_is_is_read_at_its_place(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "A.npz", "w") as archive:
        for k, name in enumerate(("short", "a name that is longer")):
            content = io.BytesIO()
            np.save(content, np.full((2, 3), k, np.float64))
            member = zipfile.ZipInfo(f"{name}.npy")
            member.extra = b"\xfe\xca\x04\x00abcd"  # what another program adds between the name and the content
            archive.writestr(member, content.getvalue())
    tensors = open_checkpoint(tmp_path / "A.npz").tensors
    assert_array_equal(tensors["short"].whole(), np.zeros((2, 3)))
    assert_array_equal(tensors["a name that is longer"].slab(1, 6), np.ones(5))


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


def test_leading_axes_of_one_entry_do_not_have_all_of_a_tensor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    values = torch.arange(12.0).reshape(3, 4)
    torch.save({"w": values.T[None, None]}, tmp_path / "A.pt")
    tensor = open_checkpoint(tmp_path / "A.pt").tensors["w"]
    assert tensor.shape == (1, 1, 4, 3)
    assert_array_equal(tensor.whole(), values.numpy().T[None, None])
    sizes, reshape = list[int](), torch.Tensor.reshape

    def counted(own: Any, *shape: int) -> Any:
        sizes.append(own.numel())
        return reshape(own, *shape)

    monkeypatch.setattr(torch.Tensor, "reshape", counted)
    assert_array_equal(tensor.slab(4, 6), [5.0, 9.0])
    assert_array_equal(tensor.slab(5, 7), [9.0, 2.0])
    assert sizes == [3, 6]


def test_a_pytorch_vector_whose_numbers_lie_apart_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.arange(12.0).reshape(3, 4)[:, 1], "v": torch.arange(3.0).expand(1, 3).T}, tmp_path / "A.pt")
    tensors = open_checkpoint(tmp_path / "A.pt").tensors
    assert_array_equal(tensors["w"].slab(1, 3), [5.0, 9.0])
    assert_array_equal(tensors["v"].slab(1, 3), [1.0, 2.0])


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
    report = merge_checkpoints(linear(*files), tmp_path / "out")
    assert merged(tmp_path / "out").keys() == SHAPES.keys() - {HEAD}
    note = f"'{HEAD}' is tied to '{EMBEDDING}', and written once, under that name."
    assert note in report.notes
    assert note in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_heads_that_all_models_tie_are_written_once(tmp_path: Path, config: Any) -> None:  # mergekit 385, 390
    both = arrays(0) | {HEAD: arrays(0)[EMBEDDING]}
    one = {name: value for name, value in arrays(1).items() if name != HEAD}
    models = folder_of(tmp_path / "A", both, config=config), folder_of(tmp_path / "B", one, config=config)
    report = merge_checkpoints(linear(*models), tmp_path / "out")
    assert merged(tmp_path / "out").keys() == SHAPES.keys() - {HEAD}
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == config
    assert f"'{HEAD}' is tied to '{EMBEDDING}', and written once, under that name." in report.notes


@pytest.mark.parametrize(
    "config", [None, {"vocab_size": 7}, {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}]
)
def test_a_head_that_no_model_says_to_be_tied_stays(tmp_path: Path, config: Any) -> None:
    # Such a model may be untied by default, as Llama is, and would be loaded without a head.
    both = [
        folder_of(tmp_path / n, arrays(k) | {HEAD: arrays(k)[EMBEDDING]}, config=config) for k, n in enumerate("AB")
    ]
    merge_checkpoints(linear(*both), tmp_path / "out")
    out = merged(tmp_path / "out")
    assert_array_equal(out[HEAD], out[EMBEDDING])


@pytest.mark.parametrize("inner", [False, True])
def test_a_head_that_one_model_ties_is_read_from_its_embedding(
    tmp_path: Path, inner: bool
) -> None:  # mergekit 464, 615
    tied = {name: value for name, value in arrays(0).items() if name != HEAD}
    wrapped = [
        {"text_config": {"tie_word_embeddings": value}} if inner else {"tie_word_embeddings": value}
        for value in (True, False)
    ]
    models = (
        folder_of(tmp_path / "A", tied, config=wrapped[0]),
        folder_of(tmp_path / "B", arrays(1), config=wrapped[1]),
    )
    report = merge_checkpoints(linear(*models), tmp_path / "out")
    assert any(f"'{HEAD}' is tied to another tensor in some of the models, and a tensor" in n for n in report.notes)
    out = merged(tmp_path / "out")
    assert_allclose(out[HEAD], (arrays(0)[EMBEDDING] + arrays(1)[HEAD]) / 2, atol=1e-6)
    assert_allclose(out[EMBEDDING], (arrays(0)[EMBEDDING] + arrays(1)[EMBEDDING]) / 2, atol=1e-6)
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written == {"tie_word_embeddings": False} | wrapped[1]


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
    report = merge_checkpoints(linear(*models, pad_vocabulary=True), tmp_path / "out")
    (note,) = report.notes
    assert re.fullmatch(
        r"The merged model has 9 tokens, and .*A, from .* copied, 7; copy that of .*B in its place\.", note
    )
    assert not merge_checkpoints(linear(*models[::-1], pad_vocabulary=True), tmp_path / "other").notes
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


@pytest.mark.parametrize("config", [{"text_config": {"vocab_size": 7, "x": 1}}, {"vocab_size": 7}, {"x": 1}])
def test_padding_changes_the_size_of_the_vocabulary_where_the_configuration_has_it(tmp_path: Path, config: Any) -> None:
    untied = {"tie_word_embeddings": False}
    longer = arrays(1) | {name: np.ones((9, 6), np.float32) for name in (EMBEDDING, HEAD)}
    models = [
        folder_of(tmp_path / name, v, config=config | untied) for name, v in {"A": arrays(0), "B": longer}.items()
    ]
    merge_checkpoints(linear(*models, pad_vocabulary=True), tmp_path / "out")
    expected = json.loads(json.dumps(config).replace("7", "9"))
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == expected | untied


def test_rows_that_are_missing_are_those_of_the_longest(tmp_path: Path) -> None:
    models = [saved(tmp_path, name, {EMBEDDING: np.full((2 * k, 3), k, np.float32)}) for k, name in enumerate("ABC", 1)]
    merge_checkpoints(linear(*models, pad_vocabulary=True), tmp_path / "out")
    rows = merged(tmp_path / "out")[EMBEDDING][:, 0]
    assert_allclose(rows, [2, 2, (3 + 2 + 3) / 3, (3 + 2 + 3) / 3, 3, 3], rtol=1e-6)


def test_a_matrix_within_a_layer_is_no_head_that_may_be_tied(tmp_path: Path) -> None:
    name = "layers.0.attention.output.weight"
    models = saved(tmp_path, "A", {EMBEDDING: np.eye(3), name: np.eye(3)}), saved(tmp_path, "B", {EMBEDDING: np.eye(3)})
    refused(linear(*models), tmp_path / "out", f"'{name}' is in .*A.* but not in .*B")


@pytest.mark.parametrize(("mean", "variance"), [("running_mean", "running_var"), ("moving_mean", "moving_variance")])
def test_models_that_are_no_language_models_merge_too(  # mergekit 159, 423, 461
    mean: str, variance: str, tmp_path: Path
) -> None:
    def convnet(seed: int) -> Arrays:
        values = arrays(seed, {"features.0.weight": (4, 3, 3, 3), "features.1.weight": (4,), "classifier.bias": (2,)})
        values[f"features.1.{mean}"] = np.full(4, float(seed), np.float32)
        values[f"features.1.{variance}"] = np.full(4, 1.0 + seed, np.float32)
        values["features.1.num_batches_tracked"] = np.asarray(100 + seed)
        return values

    models = []
    for k in range(2):
        fisher = {
            n: v**2 + 0.1 for n, v in convnet(k).items() if not n.endswith((mean, variance, "num_batches_tracked"))
        }
        models.append(PlannedModel(saved(tmp_path, f"M{k}", convnet(k)), fisher=saved(tmp_path, f"F{k}", fisher)))
    report = merge_checkpoints(MergePlan(tuple(models)), tmp_path / "out")
    out = merged(tmp_path / "out")
    assert out["features.1.num_batches_tracked"] == 100
    assert isinstance(report.alpha, float)
    np.testing.assert_allclose(out[f"features.1.{mean}"], report.alpha, rtol=1e-6)
    assert any("num_batches_tracked" in note for note in report.notes)
    assert any("estimate them anew" in note for note in report.notes)


def test_companions_are_copied_from_the_base(tmp_path: Path) -> None:
    models = [folder_of(tmp_path / name, arrays(k), config={"name": name}) for k, name in enumerate("AB")]
    for name in ("tokenizer.json", "generation_config.json", "merges.txt"):
        for model in models:
            (model / name).write_text(f"{model.name} {name}", encoding="utf-8")
    (models[1] / "README.md").write_text("not this", encoding="utf-8")
    (models[1] / "trainer_state.json").write_text("{}", encoding="utf-8")
    merge_checkpoints(linear(*models, base_model=models[1]), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8") == "B tokenizer.json"
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert (tmp_path / "out" / "merges.txt").exists()
    assert "not this" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_what_belongs_to_the_base_in_inner_folders_is_copied_but_no_other_weights(tmp_path: Path) -> None:
    first, second = (folder_of(tmp_path / name, arrays(k), config={}) for k, name in enumerate("AB"))
    for place, file in {"1_Pooling": "config.json", "2_Dense": "config.json", ".cache": "a.json"}.items():
        (first / place).mkdir()
        (first / place / file).write_text("{}", encoding="utf-8")
    saved(first / "2_Dense", "model", {"w": np.ones(2)})
    report = merge_checkpoints(linear(first, second), tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text(encoding="utf-8") == "{}"
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if file.is_dir()) == ["1_Pooling"]
    assert f"Folders of {first} with weights of their own were not copied: 2_Dense." in report.notes


def test_a_folder_within_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    blobs, inner = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "unet"
    blobs.mkdir()
    inner.mkdir(parents=True)
    (inner / "model.safetensors").symlink_to(saved(blobs, "x", arrays(0)))
    assert open_checkpoint(inner).tensors.keys() == arrays(0).keys()
    (inner / "config.json").symlink_to(saved(tmp_path, "outside", {}))
    with pytest.raises(BecameError, match="is a link that leads out of its folder"):
        open_checkpoint(inner)


def test_a_name_that_means_something_else_in_safetensors_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "A.npz", __metadata__=np.ones(2))
    with pytest.raises(BecameError, match="has a tensor '__metadata__'"):
        open_checkpoint(tmp_path / "A.npz")
