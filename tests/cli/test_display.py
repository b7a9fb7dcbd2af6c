"""What a command shows: text, little of it, or JSON alone; a run's progress; and the log on standard error."""

import io
import json
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapters.cli.display import LOGGER, RunProgress, display_of, logged
from adapters.cli.main import main
from adapters.cli.options import Output
from adapters.runs import RunDirectory
from adapters.runs.files import write_file
from adapters.torch.run import BACKEND
from became_core.continual import EpochEnd, TaskEnd

RUN = ["--preset", "quick", "--methods", "gpm", "--epochs", "1", "--batch-size", "64", "--first", "2"]


def test_quiet_shows_the_table_and_where_the_results_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BACKEND, [*RUN, "--out", str(tmp_path), "--quiet"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].strip() == "Accuracies in percent, seed 0"
    assert not [line for line in lines if "α" in line]  # where nothing is merged, nothing is said of it
    assert lines[-1] == f"results: {tmp_path}/<method>-seed<k>/results.json, {tmp_path}/summary.csv"
    assert "epoch 1/1" not in shown.out
    assert shown.err == ""
    assert main(BACKEND, [*RUN, "--out", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().out == shown.out  # "finished before" is no result
    assert main(BACKEND, [*RUN, "--lr", "-1", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_with_brackets_in_its_name_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o[lr=1] [b]"
    assert main(BACKEND, [*RUN, "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"{out}/summary.csv")


def test_json_is_the_events_and_results_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = ["--seeds", "0", "1"]
    assert main(BACKEND, [*RUN, *seeds, "--out", str(tmp_path), "--log", "json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for seed in (0, 1):
        run = RunDirectory(tmp_path, "gpm", seed)
        mine = [event for event in shown if event["run"] == run.name]
        logged_ = [json.loads(line) for line in run.events.file.read_text().splitlines()]
        assert [event["event"] for event in mine] == ["begin", "epoch", "task", "epoch", "task", "end", "result"]
        for event, other in zip(mine, logged_, strict=False):
            assert {**event, "time": None, "run": None} == {**other, "time": None, "run": None}
        results = json.loads(run.results_file.read_text())
        assert {name: mine[-1][name] for name in results if name != "sha256"} == {
            name: value for name, value in results.items() if name != "sha256"
        }
        assert mine[-1]["before"] is False
    assert main(BACKEND, [*RUN, *seeds, "--out", str(tmp_path), "--log", "json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event["event"], event["run"], event["before"]) for event in shown] == [
        ("result", "gpm-seed0", True),
        ("result", "gpm-seed1", True),
    ]


def test_a_dry_run_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BACKEND, [*RUN, "--dry-run", "--log", "json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    plan = json.loads(line)
    assert (plan["event"], plan["configuration"]["benchmark"]) == ("plan", "split-mnist")
    assert plan["steps"] == {"gpm": 2 * 12}  # 760 images a task, without those held out


@pytest.mark.parametrize(("more", "told"), [([], True), (["--quiet"], False), (["--log-level", "error"], False)])
def test_a_damaged_checkpoint_is_a_warning(
    more: list[str], told: bool, tmp_path: Path, after_saves: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    after_saves(2)
    assert main(BACKEND, [*RUN, "--out", str(tmp_path)]) == 130
    after_saves(0)
    last = sorted((tmp_path / "gpm-seed0" / "checkpoints").glob("*.json"))[-1]
    write_file(last, b"{")
    capsys.readouterr()
    assert main(BACKEND, [*RUN, "--out", str(tmp_path), "--log", "json", *more]) == 0
    said = capsys.readouterr()
    assert said.err == (f"warning: gpm-seed0: {last} is damaged; it is left out.\n" if told else "")
    first = json.loads(said.out.splitlines()[0])
    assert (first["event"], first["after"]) == ("resume", "task 1/2, stage 1, epoch 1")


def test_the_log_and_pythons_warnings_are_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    before = LOGGER.level, list(LOGGER.handlers), warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for level, expected in (
            ("info", ["info: b", "warning: c", "warning: taps do not know it"]),
            ("error", []),
        ):
            with logged(level):  # type: ignore[arg-type] # they are levels
                LOGGER.debug("a")
                LOGGER.info("b")
                logging.getLogger("became.core").warning("c")
                for _ in range(3):  # it is shown once
                    warnings.warn("taps do not know it", stacklevel=1)
            assert capsys.readouterr().err.splitlines() == expected
    assert (LOGGER.level, LOGGER.handlers, warnings.showwarning) == before


def test_debug_tells_what_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BACKEND, [*RUN, "--first", "1", "--out", str(tmp_path), "--log-level", "debug", "--quiet"]) == 0
    assert "debug: split-mnist: 5000 samples are read" in capsys.readouterr().err


EVENTS: list[EpochEnd | TaskEnd] = [
    EpochEnd(0, 1, 1, 2, 0.5, 0.05, math.nan),
    EpochEnd(0, 1, 2, 2, 0.25, 0.0, 1.125),
    TaskEnd(0, None, [90.0], [90.0]),
    EpochEnd(1, 1, 1, 1, 0.5, 0.05, math.nan),
    EpochEnd(1, 2, 1, 1, 0.5, 0.05, math.nan),
    TaskEnd(1, 0.625, [80.0, 95.0], [40.0, 95.0], frozenset({"fc2.weight", "conv1.weight"}), temperature=0.25),
]


def show(progress: RunProgress, event: EpochEnd | TaskEnd) -> None:
    if isinstance(event, EpochEnd):
        progress.on_epoch_end(event)
    else:
        progress.on_task_end(event)


def test_without_a_terminal_every_event_is_one_plain_line() -> None:
    text = io.StringIO()
    with RunProgress(Console(file=text, width=40), "became-seed0", tasks=2, stages=2) as progress:
        for event in EVENTS:
            show(progress, event)
    assert text.getvalue().splitlines() == [
        "became-seed0  task 1/2  stage 1  epoch 1/2  loss 0.5000  lr 0.05",
        "became-seed0  task 1/2  stage 1  epoch 2/2  loss 0.2500  lr 0  validation loss 1.1250",
        "became-seed0  task 1/2 learned  accuracy 90.0",
        "became-seed0  task 2/2  stage 1  epoch 1/1  loss 0.5000  lr 0.05",
        "became-seed0  task 2/2  stage 2  epoch 1/1  loss 0.5000  lr 0.05",
        "became-seed0  task 2/2 learned  alpha 0.625  curvature x 0.250  accuracy 80.0 95.0",
        "became-seed0  the protected space of conv1.weight is full: no update is left for it in stage 1",
        "became-seed0  the protected space of fc2.weight is full: no update is left for it in stage 1",
    ]


def test_on_a_terminal_the_bar_shows_the_state_and_only_moves_forward() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    done = []
    with RunProgress(console, "became-seed0", tasks=2, stages=2) as progress:
        for event in EVENTS:
            show(progress, event)
            done.append(progress.completed)
    assert done == [0.25, 0.5, 1, 1.5, 2, 2]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "task 2/2  stage 2  epoch 1/1  loss 0.5000  lr 0.05" in shown
    assert "took" in shown
    assert "left" in shown


def test_the_bar_fits_a_terminal_of_80_columns() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with RunProgress(console, "finetune-seed0", tasks=5, stages=2) as progress:
        for event in EVENTS:
            show(progress, event)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert "task 2/5 stage 2 epoch 1/1" in shown


def test_several_runs_have_a_bar_each_and_one_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=150)
    monkeypatch.setattr("adapters.cli.display.Console", lambda **options: console)
    display = display_of(Output())
    first, second = (RunDirectory(tmp_path, "gpm", seed) for seed in (0, 1))
    finished: Any = None  # what came out is not shown here
    with display.several(2):
        with display.watching(first, "torch", 2, 2) as one, display.watching(second, "torch", 2, 2) as two:
            for event in EVENTS[:3]:
                name = "epoch" if isinstance(event, EpochEnd) else "task"
                one.add(name, **asdict(event))
            two.add("resume", after="task 1/2", tasks_done=1)
            assert isinstance(one, RunProgress)
            assert isinstance(two, RunProgress)
            assert (one.completed, two.completed) == (1.0, 1.0)
        display.result(first, finished, before=False)
    assert "gpm-seed0  task 1/2 learned  accuracy 90.0" in text.getvalue()
    assert "gpm-seed1  goes on after task 1/2" in text.getvalue()
    assert "all runs" in text.getvalue()
    assert "1/2 finished" in text.getvalue()
