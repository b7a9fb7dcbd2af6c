"""What does not fit together, or is no checkpoint, is refused in a sentence that names file and tensor."""

import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from adapters.checkpoints import merge_checkpoints, open_checkpoint, resources
from became_core import BecameError
from tests.checkpoints.models import HEAD, SHAPES, Arrays, arrays, folder_of, linear, merged, pair, refused, saved


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


def test_a_model_whose_configuration_says_that_it_is_quantised_is_refused(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "A", arrays(0), config={"quantization_config": {"bits": 4}})
    refused(linear(place, place), tmp_path / "out", r"A is quantised \(quantization_config\)")
    (place / "config.json").write_text('{"quantization_config": null}', encoding="utf-8")
    merge_checkpoints(linear(place, place), tmp_path / "out")


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


def limited(soft: int, hard: int, code: str) -> str:
    """What a process prints that may open so many files."""
    pytest.importorskip("resource")
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
    imports = "from tests.checkpoints.models import *\n"
    command = [sys.executable, "-c", imports + limit + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_more_shards_than_a_process_may_open_are_merged_or_refused_in_a_sentence(tmp_path: Path) -> None:
    values = [{f"layers.{k}.weight": np.full(4, seed, np.float32) for k in range(60)} for seed in (1, 3)]
    first, second = (folder_of(tmp_path / name, v, shards=60) for name, v in zip("AB", values, strict=True))
    plan = f"linear(Path({str(first)!r}), Path({str(second)!r}), shard_size=10)"
    code = f"""
try:
    print(len(merge_checkpoints({plan}, Path({str(tmp_path)!r}) / "out").files))
except BecameError as error:
    print(error)
"""
    assert re.search(
        r"cannot read .*B.*: more files are open than .* allow more by ulimit -n\.$", limited(100, 100, code)
    )
    assert re.search(r"cannot write .*out: more files are open than .* by ulimit -n; the same", limited(160, 160, code))
    assert limited(100, 1000, code) == "60\n"
    assert_array_equal(merged(tmp_path / "out")["layers.59.weight"], 2.0)


def test_what_the_calling_program_holds_is_no_part_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "resident", lambda: 10 * 2**30)  # a framework and a model of its own, say
    merge_checkpoints(pair(tmp_path), tmp_path / "out", memory=256 * 2**20)
    assert (tmp_path / "out" / "model.safetensors").exists()
