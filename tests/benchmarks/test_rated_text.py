"""Text that is rated with a number: samples, what is refused, and a short run of the command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.text import load_rated_text
from adapters.runs.directory import read_results
from became_core import BecameError
from tests.benchmarks.test_text import folder_with

ROWS = {"text": ["good", "bad, by far", "é"], "domain": ["films", "films", "news"], "rating": [3.5, -2, 0.0]}


def test_a_sample_ends_with_the_last_byte_of_its_text(tmp_path: Path) -> None:
    dataset = load_rated_text(folder_with(tmp_path, ROWS, ROWS), context=6)
    assert [row.tobytes() for row in dataset.images[:3]] == [b"\0\0good", b"bad, b", b"\0\0\0\0" + "é".encode()]
    assert dataset.labels[:3].tolist() == [[3.5], [-2.0], [0.0]]
    stream = BENCHMARKS["text-sentiment"].stream(dataset, 0, validation=0.0, seed=0, class_order="label")
    assert (len(stream.tasks), stream.shared_head, stream.unit) == (2, True, "RMSE")
    assert dataset.classes == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rating": ["high", "low", "none"]}, "row 0 of .* has the rating 'high'; give a finite number"),
        ({"rating": [1.0, float("nan"), 0.0]}, "row 1 of .* has the rating nan; give a finite number"),
        ({"text": ["good", "", "fine"]}, "row 1 of .* has no text"),
        ({"domain": ["films", "films", "other"]}, "the domain 'news' of .* is not in both"),
    ],
)
def test_ratings_that_cannot_be_learned_are_refused_in_a_sentence(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BecameError, match=message):
        load_rated_text(folder_with(tmp_path, ROWS | change, ROWS), context=6)


def test_without_data_or_a_column_the_command_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(BecameError, match="comes without data; name by --data-dir"):
        load_rated_text(None)
    with pytest.raises(BecameError, match="holds no files"):
        load_rated_text(tmp_path)
    rows = {name: ROWS[name] for name in ("text", "domain")}
    with pytest.raises(BecameError, match="has no column 'rating'; its columns are text, domain"):
        load_rated_text(folder_with(tmp_path, rows, rows))


def test_the_command_learns_ratings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from adapters.cli.main import main
    from adapters.torch.run import BACKEND

    rng = np.random.default_rng(0)
    high = rng.random(64) < 0.5
    rows = {
        "text": [f"{'very ' * int(rng.integers(0, 2))}{'good' if each else 'bad'}" for each in high],
        "domain": ["films", "news"] * 32,
        "rating": np.where(high, 3.0, -3.0).tolist(),
    }
    folder_with(tmp_path, rows, rows)
    words = ["--benchmark", "text-sentiment", "--data-dir", str(tmp_path), "--context", "12", "--epochs", "8"]
    words += ["--stage2-epochs", "2", "--lr", "0.005", "--batch-size", "8", "--out", str(tmp_path / "runs")]
    assert main(BACKEND, [*words, "--methods", "became"]) == 0
    assert "RMSE" in capsys.readouterr().out
    (run,) = read_results(tmp_path / "runs")
    assert (run.unit, run.samples) == ("RMSE", [])
    assert run.loss[1].max() < 1.5  # of 3 for the mean of all
    assert main(BACKEND, [*words, "--network", "gpt", "--methods", "gpm"]) == 2
    assert "the backbone must map samples to features" in capsys.readouterr().err
