"""Tables with a task column: what is read, what is refused, and a whole run of the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.analysis.comparison import comparison, gather
from adapters.analysis.report import report
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.tabular import load_tabular
from adapters.runs.directory import read_results
from became_core import BecameError
from became_core.curvature import Categorical, Gaussian

ROWS = [("a", 1.5, "red", 0.5), ("b", 2.5, "blue", -1.0), ("a", 3.5, "red", 2.25), ("b", 4.5, "red", 1.0)] * 3


def table(folder: Path, text: str | bytes | None = None) -> Path:
    file = folder / "houses.csv"
    if text is None:
        lines = ["task,size,colour,target", *(",".join(map(str, row)) for row in ROWS)]
        text = "\n".join(lines) + "\n"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_file_is_read_with_its_columns(tmp_path: Path, as_folder: bool) -> None:
    file = table(tmp_path)
    dataset = load_tabular(tmp_path if as_folder else file)
    assert dataset.name == "houses"
    assert dataset.images.shape == (12, 3, 1, 1)  # the size, and whether it is blue or red
    assert isinstance(dataset.likelihood, Gaussian)
    assert dataset.domains is not None
    ours = sorted(zip(dataset.domains, dataset.images[:, 0, 0, 0], dataset.labels[:, 0], strict=True))
    expected = sorted(("ab".index(task), size, target) for task, size, _, target in ROWS)
    np.testing.assert_allclose(ours, expected)
    np.testing.assert_array_equal(dataset.images[:, 1:, 0, 0].sum(axis=1), 1)
    assert len(dataset.images) - dataset.train_size == 2


def test_parquet_is_read_alike(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ("task", "size", "colour", "target")
    columns = {name: [row[place] for row in ROWS] for place, name in enumerate(names)}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "houses.parquet"))
    ours = load_tabular(tmp_path / "houses.parquet")
    (tmp_path / "houses.parquet").unlink()
    theirs = load_tabular(table(tmp_path))
    np.testing.assert_array_equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_a_row_of_parquet_whose_task_is_no_number_has_no_task(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"task": [0.0, float("nan")] * 15, "x": list(range(30)), "target": list(range(30))}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "houses.parquet"))
    with pytest.raises(BecameError, match="houses has a row without a task; fill the column 'task'"):
        load_tabular(tmp_path)


def test_text_and_few_whole_numbers_are_classes(tmp_path: Path) -> None:
    file = table(tmp_path)
    dataset = load_tabular(file, target_column="colour")
    assert isinstance(dataset.likelihood, Categorical)
    assert dataset.classes == 2
    whole = table(tmp_path, "task,x,target\n" + "".join(f"{row % 2},{row},{row % 3}\n" for row in range(12)))
    assert load_tabular(whole).classes == 3
    assert isinstance(load_tabular(whole, target_kind="numbers").likelihood, Gaussian)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (None, {"task_column": "street"}, "no column 'street'; its columns are task, size, colour, target"),
        (None, {"target_column": "price"}, "no column 'price'"),
        (None, {"target_column": "colour", "target_kind": "numbers"}, "holds text; it is no target for regression"),
        ("task,target\na,1\na,2\n", {}, "no column besides"),
        ("task,x,target\na,1,2\na,,3\n", {}, "row 2 of houses has nothing in the column 'x'"),
        ("task,x,target\na,1,2\na,inf,3\n", {}, "row 2 of houses has inf in the column 'x'"),
        ("task,x,target\na,1,2\n,1,3\n", {}, "a row without a task"),
        ("task,x,target\na,1,2.5\na,1,3\nb,1,3\n", {}, "the task 'b' of houses has a single row"),
        ("task,x,target\na,1\n", {}, "line 2 of .* has 2 cells"),
        ("task,x,target\n\n\na,2,3\n\na,1\n", {}, "line 6 of .* has 2 cells"),
        ('task,x,target\n"a\n\nb",2,3\na,1\n', {}, "line 5 of .* has 2 cells"),
        ('task,x,target\na,2,3\n"a\n\nb",2\n', {}, "line 3 of .* has 2 cells"),
        ("task,x,target\n", {}, "holds no rows"),
        (b"task,x,target\na,1,\xff\n", {}, "no UTF-8, the first at 18"),
        ("task,x,target\na,1,red\na,1,red\n", {}, "one value alone"),
        ("task,x,x,target\na,1,2,3\na,1,2,3\n", {}, "has 2 columns of the name 'x'"),
        ("task,x,target\na,1,2\na,NA,3\na,2,3\n", {}, "row 2 of houses has 'NA' in the column 'x', whose other cells"),
        ('task,x,target\na,1,2\na,"1,234",3\na,2,3\n', {}, "row 2 of houses has '1,234' in the column 'x'"),
        (
            "task,x,target\n" + "".join(f"a,t{row},{row}\n" for row in range(1001)),
            {},
            "'x' of houses has 1,001 different texts",
        ),
    ],
)
def test_a_table_that_cannot_be_learned_is_refused_in_a_sentence(
    tmp_path: Path, text: Any, settings: Any, message: str
) -> None:
    with pytest.raises(BecameError, match=message):
        load_tabular(table(tmp_path, text), **settings)


def test_a_mark_before_the_first_name_is_no_part_of_it(tmp_path: Path) -> None:
    plain = load_tabular(table(tmp_path))
    marked = load_tabular(table(tmp_path, b"\xef\xbb\xbf" + table(tmp_path).read_bytes()))
    np.testing.assert_array_equal(marked.images, plain.images)


@given(value=st.floats(-1e6, 1e6), rows=st.integers(5, 300))
def test_of_a_constant_column_nothing_is_left(
    tmp_path_factory: pytest.TempPathFactory, value: float, rows: int
) -> None:
    lines = "".join(f"a,{value!r},{row},{row / 7}\n" for row in range(rows))
    dataset = load_tabular(table(tmp_path_factory.mktemp("constant"), f"task,same,x,target\n{lines}"))
    assert (dataset.mean[0], dataset.std[0]) == (value, 1.0)
    np.testing.assert_allclose(dataset.std[1], np.std(dataset.images[: dataset.train_size, 1, 0, 0]), rtol=1e-5)


def test_a_column_far_from_zero_keeps_how_its_values_differ(tmp_path: Path) -> None:
    """Seconds since 1970, a day long: float32 would round them to multiples of two minutes."""
    seconds = 1.7e9 + np.arange(60) * 7.0
    lines = "".join(f"a,{second!r},{row / 7}\n" for row, second in enumerate(map(float, seconds)))
    dataset = load_tabular(table(tmp_path, f"task,time,target\n{lines}"))
    times = dataset.images[:, 0, 0, 0].astype(np.float64)
    np.testing.assert_allclose(np.diff(np.sort(times)), 7.0, rtol=1e-5)
    assert abs(dataset.mean[0]) < 1e-6
    np.testing.assert_allclose(dataset.std[0], np.std(times[: dataset.train_size]), rtol=1e-5)


def test_a_missing_file_and_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BecameError, match="there is no file"):
        load_tabular(tmp_path / "houses.csv")
    table(tmp_path)
    (tmp_path / "other.csv").write_text("task,x,target\n")
    with pytest.raises(BecameError, match="holds 2 tables"):
        load_tabular(tmp_path)


def test_the_table_of_our_own_making_is_the_same_every_time() -> None:
    first, again = load_tabular(None), load_tabular(None, task_column="place")
    assert first.name == "synthetic-drift"
    np.testing.assert_array_equal(first.images, again.images)
    stream = BENCHMARKS["tabular"].stream(first, 0, validation=0.0, seed=0, class_order="label")
    assert stream.shared_head
    assert [len(task.train) for task in stream.tasks] == [480] * 5
    own = BENCHMARKS["tabular"].stream(first, 5, validation=0.0, seed=0, class_order="label", settings={"head": "own"})
    assert not own.shared_head
    with pytest.raises(BecameError, match="has 5 tasks; leave --tasks out"):
        BENCHMARKS["tabular"].stream(first, 3, validation=0.0, seed=0, class_order="label")


def test_the_command_compares_methods_by_their_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from adapters.cli.main import main
    from adapters.torch.run import BACKEND

    out = tmp_path / "runs"
    words = ["--benchmark", "tabular", "--first", "2", "--epochs", "2", "--stage2-epochs", "1", "--out", str(out)]
    assert main(BACKEND, [*words, "--methods", "became", "finetune"]) == 0
    shown = capsys.readouterr().out
    assert "−RMSE" in shown
    for run in read_results(out):
        assert run.unit == "RMSE"
        np.testing.assert_allclose(run.scores.acc, -run.loss[-1].mean())
        assert f"{run.correlation[-1].mean():.3f}" in shown.split("the cost")[0]
        assert 0 < run.correlation[1, 1] < 1
        np.testing.assert_allclose(run.scores.bwt, run.loss[0, 0] - run.loss[1, 0])
        events = (out / f"{run.method}-seed0" / "events.jsonl").read_text().splitlines()
        ends = [json.loads(line) for line in events if json.loads(line)["event"] == "task"]
        assert [end["loss"] for end in ends] == [run.loss[0, :1].tolist(), run.loss[1].tolist()]
        assert [end["correlation"] for end in ends] == [run.correlation[0, :1].tolist(), run.correlation[1].tolist()]
    scores, costs = comparison(gather([out]))
    assert [column.heading for column in scores.columns][2:5] == ["RMSE", "−RMSE", "BWT"]
    assert scores.columns[-1].heading == "correlation"
    assert "epochs" in [column.heading for column in costs.columns]
    page = report([out]).read_text(encoding="utf-8")
    assert "<h3>RMSE</h3>" in page
    assert "<h3>Correlation of predictions with targets</h3>" in page
    assert "Class-incremental" not in page
    assert main(BACKEND, [*words, "--methods", "hat"]) == 2
    assert "share a head" in capsys.readouterr().err
