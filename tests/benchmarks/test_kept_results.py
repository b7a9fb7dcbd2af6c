"""The tables whose runs' results are kept in ``benchmarks/results`` are these results, to the last digit."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from adapters.analysis.bootstrap import Estimate
from adapters.analysis.groups import Group, groups_of
from adapters.runs import finished_runs
from became_core import BecameError
from benchmarks.keep import keep

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results"
IMAGES, ALPHA = ((ROOT / "docs" / "results" / name).read_text(encoding="utf-8") for name in ("images.md", "alpha.md"))

# How the rows of runs with 20 epochs a task begin, by the folder and the method.
ROWS = {
    "cifar100-20/gpm": "`gpm`",
    "cifar100-20-ogd/ogd": "`ogd`, 100 gradients a task",
    "cifar100-14-6/became-0": "`became-0`, the stable model: GPM of 14 epochs",
    "cifar100-14-6/became-grid": "`became-grid`",
    "cifar100-14-6/became-half": "`became-half`",
    "cifar100-of-20-tasks-20/gpm": "`gpm`",
    "cifar100-of-20-tasks-14-6-across/became": "`became --precision across`",
    "tinyimagenet-20/gpm": "`gpm`",
    "tinyimagenet-14-6-across/became": "`became --precision across`",
}


# Methods whose file of seed 0 is lost, and the scores of this run, in the order of the columns.
FIRST = {"coma": (68.19, -6.96, 6.96, 74.45, 21.28), "imm-mode": (64.88, 3.51, 1.28, 61.72, 21.65)}


def scores_row(begin: str, group: Group, first: Sequence[float] | None = None) -> str:
    """Return the row of a group's scores, and of another run before them."""
    names = ("acc", "bwt", "forgetting", "plasticity")
    columns = [tuple(getattr(run.scores, name) for run in group.runs) for name in names]
    columns.append(tuple(run.class_incremental_scores.acc for run in group.runs))
    columns = [(own, *others) for own, others in zip(first, columns, strict=True)] if first else columns
    cells = [begin, str(len(columns[0])), *(Estimate(column).text() for column in columns)]
    return f"| {' | '.join(cells)} |"


def test_results_say_nothing_of_a_machine() -> None:
    runs = [run for folder in KEPT.iterdir() for run in finished_runs([folder])]
    assert runs
    assert all(run.data_dir is None for run in runs)


def test_a_result_is_kept_once_and_another_run_does_not_replace_it(tmp_path: Path) -> None:
    files = keep([KEPT / "new-text-across"], tmp_path)
    before = [file.read_bytes() for file in files]
    assert files == keep([KEPT / "new-text-across"], tmp_path)
    with pytest.raises(BecameError, match="another run of became with seed 10"):
        keep([KEPT / "new-text-exact"], tmp_path)
    assert [file.read_bytes() for file in files] == before


def test_each_method_at_20_epochs_has_its_row() -> None:
    folders = [folder for folder in KEPT.iterdir() if folder.name.startswith(("cifar100-", "tinyimagenet-"))]
    groups = {
        f"{folder.name}/{group.runs[0].method}": group
        for folder in folders
        for group in groups_of(finished_runs([folder]))
    }
    assert {name: scores_row(ROWS[name], group) in IMAGES for name, group in groups.items()} == dict.fromkeys(
        ROWS, True
    )


def test_rows_of_which_the_first_seeds_file_is_lost() -> None:
    groups = groups_of(finished_runs([KEPT / "seeds-1-2-cifar100-20"]))
    rows = {group.runs[0].method: group for group in groups}
    assert rows.keys() == FIRST.keys()
    for method, group in rows.items():
        assert [run.seed for run in group.runs] == [1, 2]
        assert scores_row(f"`{method}`", group, FIRST[method]) in IMAGES


@pytest.mark.parametrize(("name", "begin"), [("across", "became --precision across"), ("half", "became-half")])
def test_new_class_orders(name: str, begin: str) -> None:
    section = ALPHA.split("## New seeds and class orders")[1].split("### One of them")[0]
    accuracies, losses = (
        [cell.strip() for cell in line.strip("|").split("|")[1:]]
        for line in section.splitlines()
        if line.startswith(f"| `{begin}` |")
    )
    for run in finished_runs([KEPT / f"new-cifar100-{name}"]):
        assert accuracies[run.seed - 10] == f"{run.scores.acc:.2f}"
        assert losses[run.seed - 10] == f"{run.mean_loss:.3f}"


def test_the_paths_with_20_tasks() -> None:
    (run,) = finished_runs([KEPT / "path-cifar100-of-20-tasks-across"])
    rows = []
    for task, path in enumerate(run.paths, start=2):
        points = [point for point in path["points"] if point["alpha"] in (0, 0.1, 0.2, 0.3, 0.5, 1)]
        rows.append(" | ".join([f"| {task} | loss", *(f"{point['loss']:.3f}" for point in points)]))
        rows.append(" | ".join(["| | accuracy", *(f"{point['accuracy']:.2f}" for point in points)]))
    assert " |\n".join(rows) in IMAGES


def test_a_longer_stage_2() -> None:
    (run,) = finished_runs([KEPT / "trial-cifar100-10-10-across"])
    alphas = " ".join(f"{alpha:.2f}".removeprefix("0") for alpha in run.alpha[1:])
    paragraph = " ".join(IMAGES.split("A longer stage 2 was tried")[1].split("##")[0].split())
    assert f"10 + 10 epochs have {run.scores.acc:.2f}" in paragraph
    assert f"Its alphas are {alphas}, larger" in paragraph


@pytest.mark.parametrize(
    ("name", "begin", "sign", "digits"),
    [
        ("encoded", "digits encoded and drawn", 1, (2, 1)),
        ("regression", "regression", -1, (3, 3)),
        ("text", "text", -1, (3, 3)),
    ],
)
def test_new_seeds_beyond_classification(name: str, begin: str, sign: int, digits: tuple[int, int]) -> None:
    """The page has RMSE and bits per byte as they are, which are scores with their signs turned."""
    folders = (KEPT / f"new-{name}-across", KEPT / f"new-{name}-exact")
    across, exact = ({run.seed: run.scores.acc for run in finished_runs([folder])} for folder in folders)
    means = [Estimate(tuple(sign * acc for acc in side.values())).text(digits[0]) for side in (across, exact)]
    differences = " ".join(f"{across[seed] - exact[seed]:z.{digits[1]}f}" for seed in across)
    (row,) = [line for line in ALPHA.split("### New seeds beyond")[1].splitlines() if line.startswith(f"| {begin}")]
    assert row.split(" | ")[1:] == [*means, f"{differences} |"]
