"""``became run`` and ``became resume``: a run comes back from its folder, with its options and to the same bits."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import adapters.cli.__main__ as became
from adapters.cli.__main__ import main
from adapters.runs import RunDirectory
from adapters.runs.configuration import Configuration
from adapters.runs.directory import read_record, read_results
from adapters.runs.files import read_sealed, write_sealed
from adapters.torch.run import BACKEND

SHORT = ["--preset", "quick", "--epochs", "1", "--stage2-epochs", "1", "--batch-size", "64", "--first", "2"]
SHORT += ["--curvature-samples", "64"]


def command(out: Path, *more: str) -> list[str]:
    return ["run", "--backend", "torch", *SHORT, "--methods", "gpm", "finetune", "--out", str(out), *more]


def results(out: Path) -> dict[str, Any]:
    """What came out of each run, seconds aside."""
    found = {file.parent.name: json.loads(file.read_text()) for file in sorted(out.glob("*/results.json"))}
    return {
        name: {key: value for key, value in values.items() if key not in ("seconds", "sha256")}
        for name, values in found.items()
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results without any interruption."""
    out = tmp_path_factory.mktemp("whole")
    assert main(command(out)) == 0
    assert sorted(results(out)) == ["finetune-seed0", "gpm-seed0"]
    return results(out)


@pytest.fixture
def interrupted(tmp_path: Path, after_saves: Callable[[int], None]) -> Callable[..., Path]:
    """A command that was interrupted within its first run."""

    def make(*more: str) -> Path:
        after_saves(1)
        assert main(command(tmp_path / "out", *more)) == 130
        after_saves(0)
        return tmp_path / "out"

    return make


def test_resume_finishes_all_runs_of_a_command_even_those_that_had_not_begun(
    expected: dict[str, Any], interrupted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted()
    assert results(out) == {}
    capsys.readouterr()
    assert main(["resume", str(out)]) == 0
    assert results(out) == expected
    shown = capsys.readouterr().out
    assert "gpm-seed0  goes on after task 1/2, stage 1, epoch 1" in shown
    assert f"{expected['gpm-seed0']['acc']:.2f}" in shown
    assert main(["resume", str(out)]) == 2
    assert capsys.readouterr().err == f"error: all runs in {out} are finished; there is nothing to resume.\n"
    file = out / "gpm-seed0" / "results.json"
    file.write_text(file.read_text()[:100])
    assert main(["resume", str(out)]) == 2
    assert f"{file}" in capsys.readouterr().err


UNKNOWN = ["--single-head", "--boundaries", "unknown", "--batch-size", "10"]


def test_a_run_without_boundaries_is_recorded_and_resumed_to_the_same_bits(
    tmp_path: Path, after_saves: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(whole, *UNKNOWN, "--methods", "gpm")) == 0
    shown = capsys.readouterr().out
    assert "What was found in the streams, in batches" in shown
    assert re.search(r"seed +segments +known +delay of each change +false alarms\n─+\n0 +2 +0 +\d +0\b", shown)
    values = results(whole)["gpm-seed0"]
    assert (values["config"]["boundaries"], values["config"]["hazard"]) == ("unknown", 0.01)
    assert values["boundaries"]["changes"] == [76]
    assert values["boundaries"]["false_alarms"] == 0
    assert all(delay <= 10 for delay in values["boundaries"]["delays"])
    assert sum(values["boundaries"]["tested"]) == 400
    assert len(values["accuracy"]) == 2
    after_saves(3)
    assert main(command(parts, *UNKNOWN, "--methods", "gpm")) == 130
    after_saves(0)
    assert main(["resume", str(parts)]) == 0
    assert results(parts)["gpm-seed0"] == values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--boundaries", "unknown"], "mnist has a head for each task, and without boundaries nothing says which head"),
        ([*UNKNOWN, "--hazard", "1"], "the hazard is 1.0; give a probability between 0 and 1."),
        ([*UNKNOWN, "--reservoir", "0"], "a reservoir of 0 samples holds nothing; let it hold at least 1."),
        ([*UNKNOWN, "--reservoir", "50"], "a reservoir of 50 samples holds 5 batches of 10; let it hold at least 80"),
        (
            [*UNKNOWN, "--reservoir", "5000"],
            "the stream of mnist has 152 batches, and the first 500 fill the reservoir",
        ),
    ],
)
def test_a_stream_that_cannot_be_watched_is_refused_before_a_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(command(tmp_path / "out", *options)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


HELD_OUT = ["--methods", "became", "--first", "3", "--validation", "0.1", "--temper"]


@pytest.mark.parametrize("options", [["calibrated", "--curvature-data", "augmented"], ["curvature"]])
def test_a_tempered_run_resumes_to_the_same_bits(
    tmp_path: Path, after_saves: Callable[[int], None], options: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(whole, *HELD_OUT, *options)) == 0
    after_saves(6)  # within the third task
    assert main(command(parts, *HELD_OUT, *options)) == 130
    after_saves(0)
    assert main(["resume", str(parts)]) == 0
    assert results(parts) == results(whole)
    (values,) = results(whole).values()
    assert values["config"]["temper"] == options[0]
    assert len(values["temperatures"]) == (3 if options[0] == "curvature" else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curvature-data", "validation", "--validation", "0"], "--curvature-data validation measures on held-out"),
        (["--temper", "rise", "--validation", "0"], "became is tempered by held-out samples, and task 1 of mnist has"),
    ],
)
def test_what_needs_held_out_samples_is_refused_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(command(tmp_path / "out", "--methods", "became", *options)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_resume_goes_on_with_the_backend_there_was_or_the_one_given(
    interrupted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = interrupted(), []

    def load(name: str) -> Any:
        asked.append(name)
        return replace(BACKEND, name=name)

    monkeypatch.setattr(became, "load_backend", load)
    assert main(["resume", str(out), "--backend", "jax"]) == 0
    assert asked == ["jax"]
    assert {name: values["backend"] for name, values in results(out).items()} == {
        "gpm-seed0": "torch+jax",
        "finetune-seed0": "jax",
    }


def test_resume_refuses_what_it_cannot_go_on_with(
    interrupted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'nowhere'} holds no runs; give a folder that --out named.\n"
    )
    out = interrupted()
    capsys.readouterr()
    file = RunDirectory(out, "gpm", 0).config_file
    config = read_sealed(file)
    for changes, message in (
        ({"config": None}, "holds no run's configuration; give the command that started the run."),
        (
            {"config": config["config"] | {"momenta": 3}},
            "has an unknown option 'momenta'; resume with the version that started this run.",
        ),
        ({"backend": "abacus"}, "is of a run on abacus; say with --backend what to resume it on."),
    ):
        write_sealed(file, config | changes)
        assert main(["resume", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {file} {message}")
        assert len(said.splitlines()) == 1
    file.write_text("{")
    assert main(["resume", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {file} is damaged; move {file.parent} away.\n"
    assert results(out) == {}


def test_a_recorded_run_comes_back_with_its_hints_and_data_that_are_gone_are_where_the_variable_says(
    interrupted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BECAME_DATA_DIR", raising=False)
    file = interrupted("--lr", "0.5", "--device", "cpu", "--data-dir", str(tmp_path)) / "gpm-seed0" / "config.json"
    record = read_record(file)
    assert (record.backend, record.method, record.seed, record.preset) == ("torch", "gpm", 0, "quick")
    short: dict[str, Any] = {"epochs": 1, "stage2_epochs": 1, "batch_size": 64, "first": 2, "curvature_samples": 64}
    expected = {**short, "lr": 0.5, "device": "cpu", "data_dir": tmp_path, "threads": 1}
    assert record.configuration == Configuration.of(expected, "gpm", "quick")
    values = read_sealed(file)
    gone = {"data_dir": str(tmp_path / "gone"), "of a later version": 1}
    write_sealed(file, values | {"hints": values["hints"] | gone})
    assert read_record(file).configuration == replace(record.configuration, data_dir=tmp_path / "gone")
    monkeypatch.setenv("BECAME_DATA_DIR", str(tmp_path))
    assert read_record(file).configuration == replace(record.configuration, data_dir=None)


def test_with_another_number_of_tasks_a_recorded_configuration_learns_all_of_them(tmp_path: Path) -> None:
    assert main([*command(tmp_path / "first"), "--first", "5", "--methods", "finetune"]) == 0
    file = tmp_path / "first" / "finetune-seed0" / "config.json"
    assert main(["run", "--config", str(file), "--tasks", "2", "--out", str(tmp_path / "other")]) == 0
    (result,) = read_results(tmp_path / "other")
    assert (result.config["tasks"], result.config["first"], len(result.accuracy)) == (2, 2, 2)


def test_rows_at_the_end_are_of_one_configuration_each_and_say_of_how_many_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--methods", "finetune"]
    assert main([*command(tmp_path), *one, "--seeds", "0", "1"]) == 0
    assert main([*command(tmp_path), *one, "--seeds", "2", "--lr", "0.01"]) == 0
    config = tmp_path / "finetune-seed1" / "config.json"
    (config.parent / "results.json").unlink()
    capsys.readouterr()
    assert main(["resume", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith("finetune (lr")]
    assert [row[:4] for row in rows[:2]] == [["finetune", "(lr", "0.1)", "2"], ["finetune", "(lr", "0.01)", "1"]]
    assert "mean ± standard deviation over the seeds of each row" in shown


def test_a_run_whose_folder_was_renamed_is_not_begun_anew(
    interrupted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted()
    renamed = (out / "gpm-seed0").rename(out / "old")
    assert main(["resume", str(out)]) == 2
    assert capsys.readouterr().err.endswith(
        f"error: {renamed} holds the run gpm-seed0; give the folder that name again.\n"
    )
    assert not (out / "gpm-seed0").exists()


def test_a_run_that_has_lost_its_configuration_is_named(
    interrupted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted()
    (out / "gpm-seed1").mkdir()
    (out / "gpm-seed0" / "config.json").rename(out / "gpm-seed1" / "config.json")
    assert main(["resume", str(out)]) == 2
    assert capsys.readouterr().err.endswith(
        f"error: {out / 'gpm-seed0'} holds checkpoints of a run and no config.json, without which they cannot be "
        "resumed; put the file back, or move the folder away.\n"
    )


def test_a_broken_result_of_another_run_is_said_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpm-seed7").mkdir()
    broken = tmp_path / "gpm-seed7" / "results.json"
    broken.write_text("{", encoding="utf-8")
    assert main([*command(tmp_path), "--methods", "finetune"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {broken} is damaged or no run's results")
    assert not (tmp_path / "finetune-seed0").exists()


def test_config_takes_a_recorded_configuration_and_options_change_it(
    expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(tmp_path / "first")) == 0
    file = tmp_path / "first" / "gpm-seed0" / "config.json"
    capsys.readouterr()
    assert main(["run", "--config", str(file)]) == 0  # the same method and seed, into a folder by its preset's name
    assert capsys.readouterr().out.startswith(f"backend: torch, as in {file}\n")
    assert results(tmp_path / "runs" / "split-mnist-quick") == {"gpm-seed0": expected["gpm-seed0"]}
    more = ["--lr", "0.25", "--methods", "finetune", "--seeds", "3", "--out", "other"]
    assert main(["run", "--config", str(file), *more]) == 0
    other = read_record(tmp_path / "other" / "finetune-seed3" / "config.json")
    before = read_record(file).configuration
    assert other.configuration == replace(before, lr=0.25, settings={})
    for arguments, message in (
        (["--config", str(file), "--preset", "paper"], "--config and --preset both give the values of all options"),
        (["--config", "nowhere.json"], "cannot read nowhere.json: No such file or directory."),
        (
            ["--config", str(file), "--epochs", "9", "--out", "other", "--methods", "finetune", "--seeds", "3"],
            "is a run",
        ),
    ):
        capsys.readouterr()
        assert main(["run", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
