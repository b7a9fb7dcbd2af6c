"""The command, end to end, on the embedded images and one short epoch."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from adapters.backend import threads_for
from adapters.cli import display
from adapters.cli.jobs import requested_jobs
from adapters.cli.main import main
from adapters.cli.options import parse_request
from adapters.runs import RunDirectory
from adapters.torch.run import BACKEND
from tests.streams import prototype_stream

SHORT = ["--preset", "quick", "--epochs", "1", "--stage2-epochs", "1", "--curvature-samples", "64"]
SHORT += ["--batch-size", "64", "--lr", "0.2"]
STREAM = prototype_stream(tasks=2)


def _files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two methods."""
    out = tmp_path_factory.mktemp("runs")
    assert main(BACKEND, [*SHORT, "--methods", "became", "finetune", "--out", str(out)]) == 0
    return out


def test_output_that_cannot_show_an_alpha_is_no_error(tmp_path: Path) -> None:
    words = [*SHORT, "--first", "2", "--methods", "became", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "adapters.torch.run", *words],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u03b1" in done.stdout


def test_a_run_leaves_results_and_a_summary(finished: Path) -> None:
    of_a_run = {"config.json", "events.jsonl", "results.json"}
    assert {file for file in _files(finished) if "checkpoints" not in file} == {
        "summary.csv",
        *(f"{run}-seed0/{name}" for run in ("became", "finetune") for name in of_a_run),
    }
    config = json.loads((finished / "became-seed0" / "config.json").read_text())
    assert (config["backend"], config["benchmark"], config["method"], config["seed"]) == (
        "torch",
        "split-mnist",
        "became",
        0,
    )
    assert config["config"]["lr"] == 0.2
    assert {"python", "numpy", "torch", "safetensors"} <= set(config["versions"])
    events = [json.loads(line) for line in (finished / "became-seed0" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["begin", *["epoch", "epoch", "task"] * 5, "end"]
    assert all(math.isfinite(event["loss"]) for event in events if event["event"] == "epoch")
    became = json.loads((finished / "became-seed0" / "results.json").read_text())
    assert len(became["accuracy"]) == 5
    assert all(len(row) == 5 for row in became["accuracy"])
    assert became["alpha"][0] is None
    assert all(0 <= alpha <= 1 for alpha in became["alpha"][1:])
    assert set(became["seconds"]) == {"stage1", "stage2", "merge", "memory", "evaluation", "total"}
    assert sum(became["epochs"]) == 10
    assert became["acc"] > 70  # chance is 50


def test_a_finished_run_is_shown_and_not_repeated(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(finished)
    assert main(BACKEND, [*SHORT, "--methods", "became", "finetune", "--out", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished before") == 2
    assert _files(finished) == before
    became = json.loads(before["became-seed0/results.json"])
    scores = next(line for line in shown.splitlines() if re.match(r" *became +task ", line))
    assert f"{became['acc']:.2f}" in scores
    merges = next(line for line in shown.splitlines() if re.match(r" *became +–", line))
    assert " ".join(f"{alpha:.2f}" for alpha in became["alpha"][1:]) in merges
    assert re.search(r"^ +class +\d", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "imagenet"], "there is no benchmark 'imagenet'"),
        (["--methods", "gmp"], "there is no method 'gmp'"),
        (["--tasks", "3"], "3 tasks do not divide the 10 classes of mnist"),
        (["--validation", "1"], "the validation fraction is 1.0"),
        (["--device", "quantum"], "PyTorch has no device 'quantum'"),
        (["--benchmark", "split-cifar100", "--data-dir", "nowhere"], "there is no folder nowhere"),
        (["--methods", "ewc", "--lr", "1e30"], "the training loss became"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(BACKEND, ["--epochs", "1", "--methods", "finetune", "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.rglob("results.json"))
    if "--lr" not in arguments:  # what fails before it begins leaves nothing
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "vgg"], "there is no network 'vgg'"),
        (["--tasks", "3"], "3 tasks do not divide the 10 classes of mnist"),
        (["--device", "quantum"], "PyTorch has no device 'quantum'"),
        (["--norm", "group"], "the mlp network has no normalisation that could be 'group'"),
    ],
)
def test_a_value_that_cannot_be_used_is_told_of_before_a_folder_of_another_configuration(
    arguments: list[str], message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _files(finished)
    words = [*SHORT, "--epochs", "2", "--methods", "became", "--out", str(finished)]
    assert main(BACKEND, [*words, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert _files(finished) == before


def test_the_same_method_or_seed_twice_is_one_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--methods", "became", "finetune", "became+gpm", "became", "--seeds", "0", "0"]
    jobs = requested_jobs(parse_request("run", [*SHORT, *twice], backend=False), lambda: BACKEND)
    assert [job.run.name for job in jobs] == ["became-seed0", "finetune-seed0", "became+gpm-seed0"]
    assert main(BACKEND, [*SHORT, "--methods", "became", "--seeds", "0", "0", "--out", str(finished)]) == 0
    assert "±" not in capsys.readouterr().out


def test_a_run_records_its_threads_and_keeps_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after_saves: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One for a small network, whatever the framework would take; others where they are asked for."""
    asked_for: list[int | None] = []

    def use_threads(threads: int | None) -> int:
        asked_for.append(threads)
        return threads or 7

    backend = replace(BACKEND, use_threads=use_threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = [*SHORT, "--methods", "finetune", "--first", "2", "--out", str(tmp_path)]
    after_saves(1)
    assert main(backend, [*run, "--threads", "2"]) == 130
    after_saves(0)
    assert RunDirectory(tmp_path, "finetune", 0).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert requested_jobs(parse_request("run", run, backend=False), lambda: backend)[0].threads(STREAM) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    asked_for.clear()
    capsys.readouterr()
    assert main(backend, run) == 0
    assert set(asked_for) == {2}  # those with which it began
    assert capsys.readouterr().err == ""

    def of_the_record(*more: str) -> int | None:
        record = str(RunDirectory(tmp_path, "finetune", 0).folder / "config.json")
        request = parse_request("run", ["--config", record, "--out", str(tmp_path / "again"), *more], backend=False)
        return requested_jobs(request, lambda: backend)[0].threads(STREAM)

    assert of_the_record() == 2
    assert of_the_record("--threads", "4", "--workers", "2") == 4
    assert of_the_record("--workers", "2") == 1  # of a small network; runs beside each other share the cores
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert of_the_record() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_for("mlp", (1, 28, 28)) == 1
    assert threads_for("alexnet", (3, 32, 32)) is None


def test_a_run_that_goes_on_with_other_threads_says_so(
    tmp_path: Path, after_saves: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    backend = replace(BACKEND, use_threads=lambda threads: threads or 7)
    run = [*SHORT, "--methods", "finetune", "--first", "1", "--out", str(tmp_path)]
    after_saves(1)
    assert main(backend, [*run, "--threads", "2"]) == 130
    after_saves(0)
    capsys.readouterr()
    assert main(backend, [*run, "--threads", "1"]) == 0
    said = "warning: finetune-seed0 began with 2 threads and goes on with 1, so that its last digits may differ"
    assert capsys.readouterr().err.startswith(said)


def test_the_first_run_fits_80_columns_and_explains_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(display, "Console", lambda **_: Console(width=80))
    words = ["--preset", "demo", "--epochs", "1", "--stage2-epochs", "1", "--first", "2", "--batch-size", "100"]
    assert main(BACKEND, [*words, "--seeds", "0", "1", "--out", str(tmp_path), "--quiet"]) == 0
    shown = capsys.readouterr().out
    tables = shown.splitlines()[:-1]  # the last line names the folder
    assert max(map(len, tables)) <= 80
    assert "…" not in shown
    for column in ("ACC", "BWT", "forgetting", "plasticity"):
        assert shown.count(column) >= 2  # once above, once explained
    assert "At α = 0 stage 2 was thrown away" in " ".join(shown.split())


def test_another_configurations_folder_is_refused_untouched(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(finished)
    assert main(BACKEND, [*SHORT, "--epochs", "2", "--methods", "gpm", "became", "--out", str(finished)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert _files(finished) == before


def test_the_module_runs_as_a_command_and_shows_plain_lines_and_a_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "adapters.torch.run",
            *SHORT,
            "--methods",
            "gpm",
            "--seeds",
            "0",
            "1",
            "--out",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONWARNINGS": "error::UserWarning"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = r"gpm-seed1  task 5/5  stage 1  epoch 1/1  loss \d+\.\d{4}  lr \S+"
    assert re.search(line, done.stdout)
    assert re.search(r"^ *gpm +task +\d+\.\d\d±\d+\.\d\d", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout
    assert f"{tmp_path}/summary.csv" in done.stdout


def test_an_unknown_option_is_status_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(BACKEND, ["--epoch-count", "3"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        ("--methods became --gradual 20", "--gradual changes nothing here, with --boundaries known."),
        ("--methods became --single-head --boundaries unknown --gradual 20", None),
        ("--methods gpm --lora-layers fc*", "--lora-layers changes nothing here, without --lora."),
        ("--methods gpm --lora 2 --lora-layers fc*", None),
        ("--methods gpm became+inflora --lora-layers fc*", None),  # a projector with adapters of its own
        ("--methods gpm --lr-steps 0.2 --schedule patience", "--lr-steps changes nothing here, with --schedule pat"),
        ("--methods gpm ewc --precision exact", "--precision changes nothing here; it is a setting of became"),
        ("--methods gpm became --precision exact", None),
        ("--methods became --context 9", "--context changes nothing here; it is a setting of text-domains"),
        ("--methods became", None),
    ],
)
def test_options_that_change_nothing_are_told(
    words: str, warned: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(BACKEND, [*words.split(), "--preset", "quick", "--print-config"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: {warned}") if warned else said.err == ""
    assert json.loads(said.out)
