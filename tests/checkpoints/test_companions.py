"""What stands beside the weights is copied where it belongs to the model, and named where it does not."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.checkpoints import merge_checkpoints, open_checkpoint
from adapters.checkpoints.companions import beside
from became_core import BecameError
from tests.checkpoints.models import arrays, folder_of, linear, saved

BELONGING = [
    *("LICENSE", "LICENSE.md", "Notice.txt", "bpe.codes", "chat_template.jinja", "config.json", "merges.txt"),
    *("modeling_own.py", "recipe.yaml", "scheduler_config.json", "source.spm", "spiece.model", "tokenizer.model.v3"),
    *("1_Pooling/config.json", "extra/deep/er/vocab.txt"),
]
STRANGERS = [
    *("all_results.json", "eval_results.json", "train_results.json", "eval_results.txt", "trainer_state.json"),
    *("latest", "latest.txt", "zero_to_fp32.py", "optimizer.pt", "scheduler.pt", "training_args.bin", "notes.docx"),
    "extra/deep/picture.png",
]
LEFT_OUT = ["README.md", ".gitattributes", "extra/.cache/a.json", "pytorch_model.bin.index.json", "became_merge.json"]


def filled(folder: Path) -> Path:
    for name in (*BELONGING, *STRANGERS, *LEFT_OUT, "runs/events.json", "unet/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    saved(folder / "unet", "model", {"w": np.ones(2)})
    return folder


def test_what_belongs_to_a_model_is_copied_and_the_rest_is_named(tmp_path: Path) -> None:
    first, second = (folder_of(tmp_path / name, arrays(k)) for k, name in enumerate("AB"))
    report = merge_checkpoints(linear(filled(first), second), tmp_path / "out")
    out = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert out == {*BELONGING, "model.safetensors", "README.md", "became_merge.json"}
    assert "A merged model" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    names = sorted([*STRANGERS, "runs/"])
    expected = f"What stands beside the weights of {first} and was not copied: {', '.join(names[:12])} and 2 more."
    assert expected in report.notes
    assert beside(first, ["model.safetensors"]).others == tuple(names)
    assert f"Folders of {first} with weights of their own were not copied: unet." in report.notes
    assert not any("not copied" in note for note in merge_checkpoints(linear(second, first), tmp_path / "two").notes)


def test_a_link_in_a_deeper_folder_must_not_lead_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "A", arrays(0))
    (folder / "one" / "two").mkdir(parents=True)
    (folder / "one" / "two" / "secret.json").symlink_to(saved(tmp_path, "outside", {}))
    with pytest.raises(BecameError, match=r"secret\.json is a link that leads out of its folder"):
        open_checkpoint(folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="whoever is root may list every folder")
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:  # pragma: no cover
    folder = folder_of(tmp_path / "A", arrays(0))
    (folder / "one").mkdir(mode=0)
    with pytest.raises(BecameError, match="cannot read"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_part_of_a_pipeline_of_diffusers_keeps_the_names_of_its_files(tmp_path: Path, shards: int) -> None:
    folders = [folder_of(tmp_path / name, arrays(k), shards=shards) for k, name in enumerate("AB")]
    stem = "diffusion_pytorch_model"
    for file in [file for folder in folders for file in folder.iterdir()]:
        if file.suffix == ".json":
            file.write_text(file.read_text(encoding="utf-8").replace('"model-', f'"{stem}-'), encoding="utf-8")
        file.rename(file.with_name(file.name.replace("model", stem, 1)))
    report = merge_checkpoints(linear(*folders, shard_size=5 * 10**9 if shards == 1 else 400), tmp_path / "out")
    assert all(name.startswith(stem) for name in report.files)
    assert (tmp_path / "out" / f"{stem}.safetensors.index.json").exists() == (len(report.files) > 1) == (shards > 1)
    assert open_checkpoint(tmp_path / "out").tensors.keys() == arrays(0).keys()


@pytest.mark.parametrize(("words", "framework"), [(None, "pt"), ({"format": "flax", "x": "y"}, "flax")])
@pytest.mark.parametrize("is_folder", [False, True])
def test_the_merged_file_says_whose_layout_its_weights_have(
    tmp_path: Path, words: Any, framework: str, is_folder: bool
) -> None:
    places = [tmp_path / name for name in "AB"]
    for k, place in enumerate(places):
        place.mkdir()
        saved(place, "model", arrays(k), words)
    models = [place if is_folder else place / "model.safetensors" for place in places]
    merge_checkpoints(linear(*models), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out" / "model.safetensors").metadata == {"format": framework}
