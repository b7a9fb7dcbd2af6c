"""Small checkpoints, as files of every format, and what the core makes of the same arrays in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints
from became_core import BecameError

Arrays = dict[str, NDArray[Any]]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (7, 6),
    "model.layers.0.mlp.weight": (6, 5),
    "model.layers.1.mlp.weight": (6, 5),
    "model.layers.1.mlp.bias": (6,),
    "model.norm.weight": (),
    "lm_head.weight": (7, 6),
}


def arrays(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, positive: bool = False) -> Arrays:
    generator = np.random.default_rng(seed)
    values = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: np.asarray(value**2 + 0.01 if positive else value) for name, value in values.items()}


def saved(folder: Path, name: str, values: Mapping[str, NDArray[Any]], metadata: Any = None) -> Path:
    file = folder / f"{name}.safetensors"
    save_file(dict(values), file, metadata)
    return file


def pair(folder: Path, *, dtype: Any = np.float32, **options: Any) -> MergePlan:
    """The plan of a merge of two models with a Fisher file each."""
    models = []
    for k, name in enumerate("AB"):
        model = saved(folder, name, {n: v.astype(dtype) for n, v in arrays(k).items()})
        fisher = saved(folder, f"F{name}", arrays(10 + k, positive=True))
        models.append(PlannedModel(model, fisher=fisher))
    return MergePlan(tuple(models), **options)


def merged(out: Path) -> Arrays:
    return {name: value for file in sorted(out.glob("*.safetensors")) for name, value in load_file(file).items()}


def bf16(values: Mapping[str, NDArray[Any]]) -> Arrays:
    return {name: value.astype(ml_dtypes.bfloat16) for name, value in values.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}


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
