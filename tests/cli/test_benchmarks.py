"""Every benchmark from one command line, on images made here, with a small network and one short epoch."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapters.cli.main import main
from adapters.torch.run import BACKEND
from tests.benchmarks.pictures import shades, write_tiny_hub, write_tiny_zip

SHORT = ["--network", "mlp", "--epochs", "1", "--stage2-epochs", "1", "--methods", "became", "--first", "2"]


def write_mini(root: Path) -> None:
    (root / "mini-imagenet").mkdir()
    labels = np.repeat(np.arange(100), 6)
    np.savez(root / "mini-imagenet" / "train.npz", images=shades(600, 84), labels=labels)


@pytest.mark.parametrize(
    ("arguments", "write", "tasks"),
    [
        (["--benchmark", "permuted-mnist", "--tasks", "3"], None, 3),
        (["--benchmark", "split-tinyimagenet"], write_tiny_zip, 25),
        (["--benchmark", "split-tinyimagenet", "--preset", "nscl"], write_tiny_hub, 25),
        (["--benchmark", "split-tinyimagenet", "--tasks", "10", "--class-order", "seeded"], write_tiny_zip, 10),
        (["--benchmark", "split-miniimagenet"], write_mini, 20),
        (["--benchmark", "split-miniimagenet", "--tasks", "5", "--projector", "sgp"], write_mini, 5),
    ],
)
def test_a_benchmark_runs_and_says_what_it_was(
    arguments: list[str], write: Callable[[Path], object] | None, tasks: int, tmp_path: Path
) -> None:
    if write is not None:
        write(tmp_path)
    out = tmp_path / "out"
    assert main(BACKEND, [*arguments, *SHORT, "--data-dir", str(tmp_path), "--out", str(out)]) == 0
    (results,) = out.glob("*/results.json")
    found = json.loads(results.read_text())
    assert (found["benchmark"], found["config"]["tasks"], found["config"]["network"]) == (arguments[1], tasks, "mlp")
    assert found["config"]["class_order"] == ("seeded" if "seeded" in arguments else "label")
    assert np.shape(found["accuracy"]) == (2, 2)


def test_a_finished_run_is_not_taken_for_one_of_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("here", "copy", "other"):
        (tmp_path / name).mkdir()
        write_mini(tmp_path / name)
    file = tmp_path / "other" / "mini-imagenet" / "train.npz"
    arrays = dict(np.load(file))
    arrays["images"][0] = 255 - arrays["images"][0]
    np.savez(file, **arrays)
    run = ["--benchmark", "split-miniimagenet", *SHORT, "--out", str(tmp_path / "out"), "--data-dir"]
    assert main(BACKEND, [*run, str(tmp_path / "here")]) == 0
    before = {it: it.read_bytes() for it in tmp_path.glob("out/*/*.json")}
    capsys.readouterr()
    assert main(BACKEND, [*run, str(tmp_path / "copy")]) == 0
    assert main(BACKEND, [*run, str(tmp_path / "other")]) == 2
    (results,) = tmp_path.glob("out/*/results.json")
    message = f"error: {results} is a run on other data than miniimagenet as it is now; choose another --out.\n"
    assert capsys.readouterr().err.endswith(message)
    assert {it: it.read_bytes() for it in before} == before
