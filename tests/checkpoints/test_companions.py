"""What stands beside the weights is copied where it belongs to the model, and named where it does not."""

import os
from pathlib import Path

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
