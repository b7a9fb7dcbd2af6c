"""A merge that was killed goes on, and ends with the bytes of one that was not; OUT is there whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adapters.checkpoints import merge_checkpoints, passes, preview
from adapters.checkpoints.tensors import SLAB
from became_core import BecameError
from tests.checkpoints.killed import plan_in
from tests.checkpoints.models import arrays, contents, pair, saved
from tests.checkpoints.test_lora import adapter
from tests.processes import WAIT

# Processes to kill, each at another moment; `nox -s stress` kills more.
KILLS = int(os.environ.get("BECAME_KILLS", "2"))
SHAPES = {f"model.layers.{k}.weight": (40, 1000 + k) for k in range(20)} | {"big.weight": (2, SLAB)}
MODULES = {f"model.layers.{k}.q_proj": (30, 20 + k) for k in range(12)}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for k, name in enumerate("AB"):
        saved(place, name, arrays(k, SHAPES))
        saved(place, f"F{name}", arrays(10 + k, SHAPES, positive=True))
    merge_checkpoints(plan_in(place), place / "whole")
    return place


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    for k, name in enumerate("AB"):
        adapter(place, name, k, rank=3 + k, modules=MODULES)
        shapes = {f"{module}.weight": shape for module, shape in MODULES.items()}
        saved(place, f"F{name}", arrays(10 + k, shapes, positive=True))
    merge_checkpoints(plan_in(place), place / "whole")
    return place


def killed_after(lines: int, folder: Path, out: Path, *scheduler: str) -> int:
    """Start the merge, kill it when it has printed so many lines, and return how many it printed in all."""
    command = [sys.executable, "-m", "tests.checkpoints.killed", str(folder), str(out), "0.002", *scheduler]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    count = 0
    for _ in process.stdout:
        count += 1
        if count == lines:
            process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait(timeout=WAIT)
    return count


def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    moments = generator.integers(1, 2 * len(SHAPES), KILLS)
    for number, moment in enumerate(moments.tolist()):
        out = tmp_path / str(number)
        killed_after(moment, folder, out)
        assert not out.exists() or contents(out) == contents(folder / "whole")
        assert number or (tmp_path / ".0.merging" / "journal.jsonl").exists()
        if not out.exists():
            killed_after(0, folder, out)
        assert contents(out) == contents(folder / "whole")
        assert list(tmp_path.glob(".*")) == []


def test_a_killed_merge_of_adapters_goes_on_and_ends_with_the_same_bytes(lora: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    # At least one while it measures and one while it writes.
    moments = [5, len(MODULES) + 5, *generator.integers(1, 2 * len(MODULES), max(1, KILLS - 2)).tolist()]
    for number, moment in enumerate(moments):
        out = tmp_path / str(number)
        killed_after(moment, lora, out)
        if not out.exists():
            killed_after(0, lora, out)
        assert contents(out) == contents(lora / "whole")
        assert list(tmp_path.glob(".*")) == []


def test_modules_that_are_written_are_not_written_again(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "SYNC_SECONDS", 0.0)

    class Stop(Exception):  # noqa: N818 # it is no error
        pass

    def stop(what: str, done: int, _: int) -> None:
        if (what, done) == ("writing", 7):
            raise Stop

    with pytest.raises(Stop):
        merge_checkpoints(plan_in(lora), tmp_path / "out", progress=stop)
    states = list[tuple[str, int]]()
    report = merge_checkpoints(plan_in(lora), tmp_path / "out", progress=lambda *state: states.append(state[:2]))
    assert states == [("writing", count) for count in range(8, len(MODULES) + 1)]
    assert report.errors.keys() == MODULES.keys()
    assert contents(tmp_path / "out") == contents(lora / "whole")


def test_what_is_done_is_not_done_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "SYNC_SECONDS", 0.0)
    seen: list[tuple[str, int]] = []

    class Stop(Exception):  # noqa: N818 # it is no error
        pass

    def stop(what: str, done: int, whole: int) -> None:
        seen.append((what, done))
        if what == "writing" and done > whole / 2:
            raise Stop

    with pytest.raises(Stop):
        merge_checkpoints(plan_in(folder), tmp_path / "out", workers=1, progress=stop)
    last, again = seen[-1], list[tuple[str, int]]()
    report = merge_checkpoints(
        plan_in(folder), tmp_path / "out", workers=1, progress=lambda *state: again.append(state[:2])
    )
    assert all(what == "writing" and done > last[1] for what, done in again)
    assert contents(tmp_path / "out") == contents(folder / "whole")
    whole = json.loads((folder / "whole" / "became_merge.json").read_text(encoding="utf-8"))
    assert {label: entry["digest"] for label, entry in whole["inputs"].items()} == report.digests
    assert report.bytes_read == preview(plan_in(folder)).bytes_to_read
    card = (folder / "whole" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == card


def test_a_torn_journal_is_read_up_to_the_tear(folder: Path, tmp_path: Path) -> None:
    killed_after(15, folder, tmp_path / "out")
    journal = tmp_path / ".out.merging" / "journal.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[:-7])
    killed_after(0, folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder / "whole")


def test_a_merge_of_other_inputs_does_not_go_on(folder: Path, tmp_path: Path) -> None:
    killed_after(2 * len(SHAPES) - 5, folder, tmp_path / "out")
    assert (tmp_path / ".out.merging").exists()
    report = merge_checkpoints(pair(tmp_path), tmp_path / "out")
    merge_checkpoints(pair(tmp_path), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert report.files == ["model.safetensors"]


def test_out_that_exists_is_refused_and_stays(tmp_path: Path) -> None:
    plan = pair(tmp_path)
    for out in (tmp_path / "A.safetensors", tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(BecameError, match="exists; nothing is overwritten"):
            merge_checkpoints(plan, out)
        assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_noticed_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pair(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(BecameError, match=r"out needs .* and .* has 100 bytes free"):
        merge_checkpoints(plan, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_disk_that_fills_up_in_between_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pair(tmp_path)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BecameError, match=r"there is no room left for .*; the same command goes on"):
        merge_checkpoints(plan, tmp_path / "out")
    monkeypatch.undo()
    merge_checkpoints(plan, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_cannot_be_read_for_a_while_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, count = os.preadv, 0

    def failing(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count > 80:  # while it measures
            raise OSError(5, "Input/output error")
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(BecameError, match=r"cannot read .*: Input/output error"):
        merge_checkpoints(plan_in(folder), tmp_path / "out", workers=1)
    monkeypatch.undo()
    states = list[tuple[str, int]]()
    merge_checkpoints(plan_in(folder), tmp_path / "out", workers=1, progress=lambda *state: states.append(state[:2]))
    assert states[0][1] > min(values.size for values in arrays(0, SHAPES).values())  # the first tensors were done
    assert contents(tmp_path / "out") == contents(folder / "whole")


def test_an_adapter_whose_configuration_changed_is_merged_anew(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "SYNC_SECONDS", 0.0)
    place = shutil.copytree(lora, tmp_path / "adapters", ignore=shutil.ignore_patterns("whole"))

    def stop(what: str, done: int, _: int) -> None:
        if (what, done) == ("writing", 7):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(plan_in(place), tmp_path / "out", progress=stop)
    config = place / "A" / "adapter_config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"lora_alpha": 8', '"lora_alpha": 80'), encoding="utf-8"
    )
    merge_checkpoints(plan_in(place), tmp_path / "out")
    merge_checkpoints(plan_in(place), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
