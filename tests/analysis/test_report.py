"""The command that writes a report: where to, and what it says of input that it cannot use."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.cli.__main__ import main
from adapters.runs import RunDirectory
from adapters.runs.files import write_sealed
from tests.analysis.runs import CONFIG, plain, run

pytestmark = pytest.mark.usefixtures("undrawn")  # test_page draws them


def saved(out: Path, **changes: Any) -> Path:
    RunDirectory(out, "became", 0).save(run(**changes))
    return RunDirectory(out, "became", 0).results_file


def test_a_report_of_several_folders_goes_into_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "a")
    RunDirectory(tmp_path / "b", "finetune", 0).save(plain())
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    file = tmp_path / "a" / "report.html"
    assert capsys.readouterr().out == f"{file}\n"
    assert 'id="method-1"' in file.read_text(encoding="utf-8")
    assert not (tmp_path / "b" / "report.html").exists()


def test_published_numbers_of_the_same_tasks_stand_beside(tmp_path: Path) -> None:
    for tasks, there in ((10, True), (3, False)):
        saved(tmp_path / str(tasks), benchmark="split-cifar100", tasks=tasks)
        assert main(["report", str(tmp_path / str(tasks))]) == 0
        page = (tmp_path / str(tasks) / "report.html").read_text(encoding="utf-8")
        assert ("75.05" in page) == there


DAMAGE: dict[str, Any] = {
    "accuracy": [[[1.0]], [[90.0]], [[90.0, None], [80.0]], [["<b>"]], 7, []],
    "alpha": [[None, "0.5", 0.5], [0.5], None],
    "ranks": [[{"fc": [1]}], [{"fc": ["1", 2]}], [{"fc": [3, 2]}], 3],
    "paths": [[{}, {}], [{"points": []}], [1, 2]],
    "seconds": [{}, {"total": "long"}, []],
    "config": [[], "x"],
    "method": [None, {"a": 1}],
    "seed": ["0", None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DAMAGE.items() for value in values])
def test_a_damaged_value_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any) -> None:
    file = saved(tmp_path)
    values = json.loads(file.read_text()) | {name: value}
    write_sealed(file, {each: value for each, value in values.items() if each != "sha256"})
    assert main(["report", str(tmp_path)]) == 2
    what = "is damaged or no run's results; move it away or choose another --out."
    assert capsys.readouterr().err == f"error: {file} {what}\n"


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000, '{"accuracy": 1e999}'])
def test_a_damaged_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    saved(tmp_path).write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


def two_schedules(out: Path, **changes: Any) -> list[str]:
    """Save gpm at 3 and at 9 epochs a task, in two folders."""
    for folder, epochs in (("short", 3), ("long", 9)):
        config = CONFIG | {"epochs": epochs}
        RunDirectory(out / folder, "gpm", 0).save(plain("gpm", epochs=[epochs] * 3, config=config, **changes))
    return [str(out / "short"), str(out / "long")]


def test_figures_of_several_folders_go_into_the_first_or_where_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = two_schedules(tmp_path)
    for options, folder, names in (
        ([], tmp_path / "short", ["plasticity", "epochs"]),
        (["--into", str(tmp_path / "new" / "one")], tmp_path / "new" / "one", ["plasticity", "epochs"]),
        (["--only", "epochs", "--into", str(tmp_path / "two")], tmp_path / "two", ["epochs"]),
        (["--only", "plasticity", "--into", str(tmp_path / "three")], tmp_path / "three", ["plasticity"]),
    ):
        assert main(["figures", *outs, *options]) == 0
        assert capsys.readouterr().out.split() == [str(folder / f"{name}.svg") for name in names]
        assert sorted(file.stem for file in folder.glob("*.svg")) == sorted(names)
    assert main(["figures", outs[0], "--into", str(tmp_path / "four")]) == 0  # one schedule makes no line
    assert [file.name for file in (tmp_path / "four").iterdir()] == ["plasticity.svg"]


@pytest.mark.filterwarnings("default:epochs.svg is left out")
def test_plasticity_is_drawn_where_no_line_can_join_the_runs_of_a_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = two_schedules(tmp_path)
    RunDirectory(tmp_path / "short", "ewc", 0).save(plain("ewc", config=CONFIG | {"threshold": 0.5}))
    RunDirectory(tmp_path / "other", "ewc", 0).save(plain("ewc", epochs=[9] * 3, config=CONFIG | {"threshold": 0.7}))
    words = ["figures", *outs, str(tmp_path / "other"), "--into", str(tmp_path / "both")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'both' / 'plasticity.svg'}\n"
    why = "ewc (short) and ewc (other) differ in threshold, not only in their schedule; leave one out."
    assert err == f"warning: epochs.svg is left out: {why}\n"
    assert main([*words, "--only", "epochs"]) == 2
    assert capsys.readouterr().err == f"error: {why}\n"


def test_figures_of_what_cannot_be_drawn_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = two_schedules(tmp_path)
    (tmp_path / "file").touch()
    RunDirectory(tmp_path / "jax", "ewc", 0).save(plain("ewc", backend="jax"))
    RunDirectory(tmp_path / "other", "ewc", 0).save(plain("ewc", benchmark="permuted-mnist"))
    for words, message in (
        ([], "there is nothing to draw; give a folder that --out named."),
        ([str(tmp_path / "none")], f"{tmp_path / 'none'} holds no finished runs; give a folder that --out named."),
        ([*outs, str(tmp_path / "jax")], "these runs are on jax and torch; draw one backend's runs."),
        ([*outs, str(tmp_path / "other")], "holds runs of permuted-mnist, the others are of split-mnist"),
        ([outs[0], "--only", "epochs"], "no method has runs of two numbers of epochs"),
        ([*outs, "--into", str(tmp_path / "file")], "cannot write to"),
    ):
        assert main(["figures", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_a_report_has_accuracy_by_epochs_where_the_runs_allow_it(tmp_path: Path) -> None:
    outs = two_schedules(tmp_path)
    assert main(["report", *outs]) == 0
    page = (tmp_path / "short" / "report.html").read_text(encoding="utf-8")
    assert "gpm 89.00 at 3, 89.00 at 9" in page
    assert (tmp_path / "short" / "figures" / "epochs.svg").exists()
    RunDirectory(tmp_path / "again", "gpm", 0).save(plain("gpm", config=CONFIG | {"lr": 0.3}))
    assert main(["report", *outs, str(tmp_path / "again"), "--into", str(tmp_path / "unclear")]) == 0
    assert not (tmp_path / "unclear" / "figures" / "epochs.svg").exists()


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no finished runs; give a folder that --out named.\n"
    assert main(["report"]) == 2
