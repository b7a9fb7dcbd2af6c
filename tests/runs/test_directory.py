"""Run directories: what is written, what is recognised, what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.runs import RunDirectory, RunResult, write_summary
from adapters.runs.directory import check_writable
from became_core import BecameError

CONFIG = {"benchmark": "split-mnist", "tasks": 2, "lr_steps": [0.25, 0.5]}


def _result(method: str = "gpm", seed: int = 0, **changes: Any) -> RunResult:
    values: dict[str, Any] = {
        "backend": "torch",
        "benchmark": "split-mnist",
        "method": method,
        "seed": seed,
        "config": CONFIG,
        "accuracy": np.array([[90.0, np.nan], [80.0, 95.0]]),
        "class_incremental_accuracy": np.array([[90.0, np.nan], [20.0, 95.0]]),
        "alpha": [None, 0.5],
        "epochs": [3, 3],
        "ranks": [{"fc1.weight": [2, 4]}, {"fc1.weight": [3, 4]}],
        "paths": [],
        "seconds": {"stage1": 1.5, "total": 2.0},
    }
    return RunResult(**(values | changes))


def _saved(out: Path, **changes: Any) -> RunDirectory:
    result = _result(**changes)
    directory = RunDirectory(out, result.method, result.seed)
    directory.save(result)
    return directory


def test_results_hold_every_promised_value_as_strict_json(tmp_path: Path) -> None:
    file = _saved(tmp_path).results_file
    assert file == tmp_path / "gpm-seed0" / "results.json"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    values = json.loads(file.read_text(), parse_constant=refuse)
    promised = (
        "benchmark method seed config accuracy class_incremental_accuracy acc bwt forgetting plasticity alpha seconds"
    )
    assert set(promised.split()) <= set(values)
    assert values["accuracy"] == [[90.0, None], [80.0, 95.0]]
    assert (values["acc"], values["bwt"], values["forgetting"], values["plasticity"]) == (87.5, -10.0, 10.0, 92.5)
    assert values["class_incremental"]["bwt"] == -70.0


def test_a_finished_run_is_recognised_and_comes_back_whole(tmp_path: Path) -> None:
    directory = _saved(tmp_path)
    config = CONFIG | {"lr_steps": (0.25, 0.5)}  # a tuple is a list on disk
    found = directory.finished("torch", config)
    assert found is not None
    np.testing.assert_array_equal(found.accuracy, _result().accuracy)
    assert found.to_json() == _result().to_json()
    assert RunDirectory(tmp_path, "gpm", 1).finished("torch", config) is None


@pytest.mark.parametrize(
    ("backend", "config", "difference"),
    [
        ("jax", CONFIG, "backend = torch, not jax"),
        ("torch", CONFIG | {"benchmark": "split-cifar100"}, "benchmark = split-mnist, not split-cifar100"),
        ("torch", CONFIG | {"tasks": 5}, "tasks = 2, not 5"),
        ("torch", {"benchmark": "split-mnist", "tasks": 2}, "lr_steps = "),
    ],
)
def test_another_configurations_run_is_refused_and_stays(
    tmp_path: Path, backend: str, config: dict[str, Any], difference: str
) -> None:
    directory = _saved(tmp_path)
    before = directory.results_file.read_bytes()
    with pytest.raises(BecameError, match=difference):
        directory.finished(backend, config)
    assert directory.results_file.read_bytes() == before


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    directory = _saved(tmp_path, config={"tasks": 2, "stage1": {"lr": 0.1}})
    with pytest.raises(BecameError, match="is of an earlier version; finish that run with it, or choose another --out"):
        directory.finished("torch", CONFIG)


def test_a_correlation_is_kept_and_may_be_undefined_or_absent() -> None:
    errors: dict[str, Any] = dict.fromkeys(("accuracy", "class_incremental_accuracy"), np.full((2, 2), np.nan))
    errors |= {"unit": "RMSE", "loss": np.array([[1.0, np.nan], [2.0, 1.0]])}
    for correlation, mean in ((np.array([[0.5, np.nan], [0.25, -0.75]]), -0.25), (np.full((2, 2), np.nan), None)):
        values = _result(**errors, correlation=correlation).to_json()
        found = RunResult.from_json(json.loads(json.dumps(values, allow_nan=False)))
        np.testing.assert_array_equal(found.correlation, correlation)
        assert found.mean_correlation == mean
    del values["correlation"]  # as of an earlier version
    assert RunResult.from_json(values).mean_correlation is None
    with pytest.raises(ValueError, match=r"^$"):
        RunResult.from_json(values | {"correlation": [[0.5, None], [0.25, 1.5]]})


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"method": "gpm"}', b"\xff\xfe"])
def test_a_damaged_file_is_named_and_stays(tmp_path: Path, damage: bytes) -> None:
    directory = _saved(tmp_path)
    directory.results_file.write_bytes(damage)
    with pytest.raises(BecameError, match=r"results\.json is damaged or no run's results"):
        directory.finished("torch", CONFIG)
    assert directory.results_file.read_bytes() == damage


def test_the_summary_has_a_row_for_each_run(tmp_path: Path) -> None:
    for method, seed in (("gpm", 0), ("gpm", 1), ("became", 0)):
        loss = np.array([[0.5, np.nan], [1.0, 0.25]]) if method == "became" else np.zeros((0, 0))
        config = CONFIG | {"score_on": "validation"} if seed else CONFIG
        _saved(tmp_path, method=method, seed=seed, loss=loss, config=config)
    write_summary(tmp_path)
    with (tmp_path / "summary.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["method"], row["seed"]) for row in rows] == [("became", "0"), ("gpm", "0"), ("gpm", "1")]
    assert float(rows[0]["acc"]) == 87.5
    assert float(rows[0]["class_incremental_acc"]) == 57.5
    assert rows[0]["epochs"] == "6"
    assert [row["score_on"] for row in rows] == ["test", "test", "validation"]
    assert [row["loss"] for row in rows] == ["0.625", "", ""]  # an earlier version recorded none


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    _saved(tmp_path)
    write_summary(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["results.json", "summary.csv"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BecameError, match=r"cannot write to .*file.*choose another --out"):
        check_writable(tmp_path / "file" / "out")
