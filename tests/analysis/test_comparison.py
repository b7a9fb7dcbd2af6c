"""Finished runs compared: what makes a row, what is refused, and the command that prints it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.analysis.comparison import comparison, gather
from adapters.analysis.groups import labelled
from adapters.analysis.tables import FORMATS, Table
from adapters.cli.__main__ import main
from adapters.runs import RunDirectory, RunResult, read_results
from became_core import BecameError

CONFIG = {"tasks": 2, "first": 2, "stage1": {"epochs": 3}}


def save(out: Path, method: str, seed: int, last: float = 80.0, **changes: Any) -> None:
    """Write a run of two tasks that ends at this accuracy on the first."""
    values: dict[str, Any] = {
        "backend": "torch",
        "benchmark": "split-mnist",
        "config": CONFIG,
        "accuracy": np.array([[90.0, np.nan], [last, 95.0]]),
        "class_incremental_accuracy": np.array([[90.0, np.nan], [20.0, 95.0]]),
        "alpha": [None, None],
        "epochs": [3, 3],
        "ranks": [{}, {}],
        "paths": [],
        "seconds": {"total": 2.0},
        "memory": [2**20, 3 * 2**20],
    }
    RunDirectory(out, method, seed).save(RunResult(method=method, seed=seed, **(values | changes)))


def tables(*outs: Path, baseline: str | None = None) -> list[Table]:
    return comparison(gather(outs), baseline)


def cells(table: Table) -> dict[str, dict[str, str]]:
    """A table's texts by the first cell of a row and the heading."""
    return {row[0]: dict(zip([c.heading for c in table.columns], row, strict=True)) for row in table.texts()}


def test_a_row_is_a_method_over_its_seeds_in_whatever_folders(tmp_path: Path) -> None:
    save(tmp_path / "a", "gpm", 0, 80.0)
    save(tmp_path / "b", "gpm", 1, 84.0)
    save(tmp_path / "b", "ewc", 0)
    table, cost = tables(tmp_path / "a", tmp_path / "b")
    rows = cells(table)
    assert list(rows) == ["gpm", "ewc"]
    assert rows["gpm"] == {
        "method": "gpm",
        "seeds": "2",
        "ACC": "88.50 ± 1.41",
        "BWT": "-8.00 ± 2.83",
        "forgetting": "8.00 ± 2.83",
        "plasticity": "92.50 ± 0.00",
        "last task": "95.00 ± 0.00",
        "class-inc.": "57.50 ± 0.00",
    }
    spent = {"method": "gpm", "seeds": "2", "epochs": "6 ± 0", "seconds": "2 ± 0", "memory": "3.0 ± 0.0"}
    assert cells(cost)["gpm"] == spent
    assert rows["ewc"]["ACC"] == "87.50"  # no deviation of one
    assert table.notes[0].startswith("Mean ± standard deviation over seeds.")
    table, _ = tables(tmp_path / "a")
    assert "±" not in table.notes[0]


def test_one_method_with_two_configurations_is_two_rows(tmp_path: Path) -> None:
    save(tmp_path / "short", "gpm", 0)
    save(tmp_path / "long", "gpm", 0, config=CONFIG | {"stage1": {"epochs": 9}})
    save(tmp_path / "twin", "gpm", 0, config=CONFIG | {"stage1": {"epochs": 6}})
    save(tmp_path / "long", "gpm", 1, backend="jax", config=CONFIG | {"stage1": {"epochs": 9}, "class_order": "label"})
    table, _ = tables(tmp_path / "short", tmp_path / "long")
    assert list(cells(tables(tmp_path / "short", tmp_path / "twin")[0])) == ["gpm (short)", "gpm (twin)"]
    assert list(cells(table)) == ["gpm (short, torch)", "gpm (long, torch)", "gpm (long, jax)"]


def test_folders_of_one_name_and_configurations_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    longer = CONFIG | {"stage1": {"epochs": 9}}
    save(tmp_path / "a" / "runs", "gpm", 0)
    save(tmp_path / "b" / "runs", "gpm", 0, config=longer)
    table, *_ = tables(tmp_path / "a" / "runs", tmp_path / "b" / "runs")
    assert list(cells(table)) == ["gpm (a/runs)", "gpm (b/runs)"]
    save(tmp_path / "c", "gpm", 0)
    save(tmp_path / "c", "gpm", 1, config=longer)
    table, *_ = tables(tmp_path / "c")
    assert list(cells(table)) == ["gpm (c)", "gpm (c) #2"]


def test_forward_transfer_is_shown_where_it_is_defined_and_memory_where_it_was_recorded(tmp_path: Path) -> None:
    save(tmp_path, "gpm", 0, accuracy=np.array([[90.0, 30.0], [80.0, 95.0]]))
    save(tmp_path, "ewc", 0, memory=[])
    rows, costs = map(cells, tables(tmp_path))
    assert (rows["gpm"]["FWT"], rows["ewc"]["FWT"]) == ("30.00", "–")
    assert (costs["gpm"]["memory"], costs["ewc"]["memory"]) == ("3.0", "–")


def test_differences_are_by_seed_with_an_interval_where_there_are_several(tmp_path: Path) -> None:
    for seed, start in enumerate((60.0, 80.0, 70.0)):
        save(tmp_path, "gpm", seed, start)
        save(tmp_path, "became", seed, start + 2 + 2 * (seed == 1))
    save(tmp_path, "ewc", 2, 60.0)
    *_, table = tables(tmp_path, baseline="gpm")
    assert table.texts()[:4] == [
        ["ACC", "became", "3", "1.33 [1.00, 2.00]"],
        ["ACC", "ewc", "1", "-5.00"],
        ["BWT", "became", "3", "2.67 [2.00, 4.00]"],
        ["BWT", "ewc", "1", "-10.00"],
    ]
    scores = dict.fromkeys(row[0] for row in table.rows)
    assert [*scores] == ["ACC", "BWT", "forgetting", "plasticity", "last task", "class-inc."]
    assert "10,000 bootstrap means" in table.notes[0]


def test_the_loss_has_a_table_of_its_own_where_it_was_recorded(tmp_path: Path) -> None:
    """The runs end at ACC 87.50 and 89.50; by loss the second is 0.25 nats better on the first task."""
    save(tmp_path, "gpm", 0, loss=np.array([[0.5, np.nan], [1.0, 0.25]]))
    save(tmp_path, "became", 0, 84.0, loss=np.array([[0.5, np.nan], [0.75, 0.25]]))
    save(tmp_path, "ewc", 0)
    _, losses, costs, differences = tables(tmp_path, baseline="gpm")
    assert (losses.title, costs.title) == ("The loss", "The cost")
    rows = cells(losses)
    assert rows["gpm"] == {"method": "gpm", "seeds": "1", "loss": "0.625", "as learned": "0.375", "rise": "0.500"}
    assert rows["became"] == {"method": "became", "seeds": "1", "loss": "0.500", "as learned": "0.375", "rise": "0.250"}
    assert rows["ewc"]["loss"] == "–"
    assert ["loss", "became", "1", "-0.125"] in differences.texts()
    assert ["ACC", "became", "1", "2.00"] in differences.texts()


def test_scores_on_held_out_samples_say_so_and_stand_beside_no_others(tmp_path: Path) -> None:
    whole: dict[str, Any] = {"benchmark": "split-cifar100", "config": CONFIG | {"tasks": 20, "first": 20}}
    held_out = {**whole, "config": whole["config"] | {"score_on": "validation"}}
    save(tmp_path / "validation", "nscl", 0, **held_out)
    save(tmp_path / "test", "nscl", 0, **whole)
    scores, costs = tables(tmp_path / "validation")  # and none of published numbers, which are of test samples
    assert scores.title == "split-cifar100, 20 tasks, scored on held-out training samples"
    assert costs.title == "The cost"
    with pytest.raises(BecameError, match=r"were scored on test samples, the others on held-out training samples; "):
        tables(tmp_path / "validation", tmp_path / "test")


def test_published_numbers_stand_beside_those_of_the_same_tasks_alone(tmp_path: Path) -> None:
    cifar: dict[str, Any] = {"benchmark": "split-cifar100", "config": CONFIG | {"tasks": 20, "first": 20}}
    save(tmp_path / "all", "nscl", 0, **cifar)
    *_, table = tables(tmp_path / "all")
    row = cells(table)["nscl"]
    assert (row["ACC"], row["BWT"], row["forgetting"], row["source"]) == ("75.95", "-3.66", "–", "1")
    assert any("Adam-NSCL (Wang, CVPR 2021)" in note and "80 epochs" in note for note in table.notes)
    save(tmp_path / "some", "nscl", 0, **cifar | {"config": CONFIG | {"tasks": 20, "first": 5}})
    assert [table.title for table in tables(tmp_path / "some")] == ["split-cifar100, 20 tasks, the first 5", "The cost"]


def test_a_comparison_of_three_seeds_fits_100_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of four methods was 117 wide. A long name of a folder is broken into lines, and no number is."""
    for seed, start in enumerate((70.0, 72.0, 74.0)):
        for folder, epochs in (("cifar100-published", 200), ("cifar100-14-6", 14)):
            config = CONFIG | {"stage1": {"epochs": epochs}}
            time = {"total": 30_000.0 * (seed + 1)}
            save(tmp_path / folder, "became-half", seed, start + epochs / 20, config=config, seconds=time)
    words = ["compare", *map(str, tmp_path.iterdir()), "--baseline", "became-half (cifar100-14-6)"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    assert "became-half 3 83.85±1.00 -17.30±2.00 17.30±2.00 92.50±0.00 95.00±0.00" in text
    assert "(cifar100-published)" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "split-cifar100"}, "holds runs of split-cifar100, the others are of split-mnist; compare runs"),
        ({"config": CONFIG | {"tasks": 5}}, "holds runs with tasks = 5, the others have 2; compare runs of one class"),
        ({"config": CONFIG | {"first": 1}}, "holds runs with first = 1, the others have 2"),
        ({"config": CONFIG | {"class_order": "random"}}, "with class_order = random, the others have label"),
        ({"config": CONFIG | {"single_head": True}}, "single_head = True, the others have False; .* one head, or"),
        ({"config": CONFIG | {"boundaries": "unknown"}}, "boundaries = unknown, the others have known; .* known, or"),
        (
            {"unit": "RMSE", "loss": np.eye(2)},
            "holds runs that are measured in RMSE, the others in %; compare runs of one unit.",
        ),
        ({}, "gpm with seed 0 is there twice, again in .*b; leave one out."),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path / "a", "gpm", 0)
    save(tmp_path / "b", "gpm", 0, **changes)
    with pytest.raises(BecameError, match=message):
        gather([tmp_path / "a", tmp_path / "b"])


def test_the_command_prints_every_format_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "gpm", 0)
    for name in FORMATS:
        assert main(["compare", str(tmp_path), "--format", name]) == 0
        assert "87.5" in capsys.readouterr().out
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "nowhere holds no finished runs; give a folder that --out named."),
        ([str(tmp_path), "--baseline", "sgd"], "there is no baseline 'sgd'; choose from 'gpm'."),
        ([], "there is nothing to compare; give a folder that --out named."),
    ):
        assert main(["compare", *arguments]) == 2
        assert capsys.readouterr().err.endswith(f"{message}\n")


def test_a_run_that_does_not_say_its_data_is_a_seed_of_those_that_agree_on_theirs(tmp_path: Path) -> None:
    for seed, data in enumerate((None, "a", "a")):
        save(tmp_path / "alike", "gpm", seed, data=data)
    (group,) = gather([tmp_path / "alike"])
    assert [run.seed for run in group.runs] == [0, 1, 2]
    for seed, data in enumerate((None, "a", "b", "a")):
        save(tmp_path / "unlike", "gpm", seed, data=data)
    found = labelled(read_results(tmp_path / "unlike"))
    assert [[run.seed for run in runs] for _, runs in found] == [[0], [1, 3], [2]]


def test_every_two_runs_must_be_on_the_same_data(tmp_path: Path) -> None:
    """The first run is of another view than the two that differ in their data alone."""
    for out, data, context in (("a", "1", "1"), ("b", "2", "2"), ("c", "3", "2")):
        save(tmp_path / out, "gpm", 0, benchmark="text-domains", data=data, config=CONFIG | {"context": context})
    with pytest.raises(BecameError, match="c holds runs on other data than the others"):
        gather([tmp_path / out for out in "abc"])


@pytest.mark.parametrize(
    ("benchmark", "setting", "is_view"), [("tabular", "target_column", False), ("text-domains", "context", True)]
)
def test_other_data_are_another_view_of_the_same_ones_or_are_refused(
    tmp_path: Path, benchmark: str, setting: str, is_view: bool
) -> None:
    for data, value in (("a", "1"), ("b", "2")):
        save(tmp_path / data, "gpm", 0, benchmark=benchmark, data=data, config=CONFIG | {setting: value})
    outs = [tmp_path / "a", tmp_path / "b"]
    if is_view:
        assert [group.label for group in gather(outs)] == ["gpm (a)", "gpm (b)"]
    else:
        with pytest.raises(BecameError, match=r"b holds runs on other data than the others; compare runs on the same"):
            gather(outs)


@pytest.mark.parametrize(
    ("config", "title"),
    [
        ({"tasks": 0, "first": 0}, "tabular, 2 tasks"),
        ({"tasks": 2, "first": 2}, "tabular, 2 tasks"),
        ({"tasks": 0, "first": 2}, "tabular, the first 2 tasks"),
        ({"tasks": 3, "first": 2}, "tabular, 3 tasks, the first 2"),
    ],
)
def test_the_title_says_of_how_many_tasks_if_the_run_knows_it(
    tmp_path: Path, config: dict[str, int], title: str
) -> None:
    save(tmp_path, "gpm", 0, benchmark="tabular", config=config)
    assert tables(tmp_path)[0].title == title


def test_runs_of_the_same_tasks_are_compared_however_these_were_chosen(tmp_path: Path) -> None:
    """Where the data have domains, 0 stands for all of them."""
    for name, first in (("whole", 0), ("counted", 2)):
        save(tmp_path / name, "gpm", 0, benchmark="tabular", config={"tasks": 0, "first": first})
    save(tmp_path / "named", "gpm", 0, benchmark="tabular", config={"tasks": 2, "first": 2})
    assert len(gather([tmp_path / name for name in ("whole", "counted", "named")])) == 3
    matrix = np.array([[90.0]])
    part: dict[str, Any] = {"accuracy": matrix, "class_incremental_accuracy": matrix, "alpha": [None], "epochs": [3]}
    part |= {"ranks": [{}], "memory": []}
    save(tmp_path / "part", "gpm", 0, benchmark="tabular", config={"tasks": 0, "first": 1}, **part)
    assert tables(tmp_path / "part")[0].title == "tabular, the first task"
    with pytest.raises(BecameError, match="part holds runs with first = 1, the others have 2; compare runs of one"):
        gather([tmp_path / "whole", tmp_path / "part"])
