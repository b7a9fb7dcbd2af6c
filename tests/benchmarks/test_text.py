"""Text by domain: samples, what is refused, and a short run of the command with a transformer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.analysis.report import report
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.text import load_text
from adapters.networks import build_network
from adapters.runs.directory import read_results
from became_core import BecameError
from became_core.continual import build_method, check_method

TEXTS = {"text": ["abcdefgh", "ijklmnopq", "ABCDEFGHIJKLMNO"], "domain": ["low", "low", "high"]}


def folder_with(folder: Path, train: Any = None, test: Any = None) -> Path:
    datasets = pytest.importorskip("datasets")
    for split, columns in (("train", train), ("test", test)):
        rows = datasets.Dataset.from_dict(TEXTS if columns is None else columns)
        rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize("within", ["", "data", "text/domains/data"])
def test_samples_are_bytes_and_labels_the_next_ones(tmp_path: Path, within: str) -> None:
    (tmp_path / within).mkdir(parents=True, exist_ok=True)
    folder_with(tmp_path / within)
    dataset = load_text(tmp_path, context=6)
    low = b"abcdefgh\n\nijklmnopq"
    assert dataset.is_text
    assert dataset.images[:4].tobytes()[: len(low) - 1] == low[:-1]
    labels = dataset.labels[:3].ravel()
    np.testing.assert_array_equal(labels[: len(low) - 1], np.frombuffer(low, np.uint8)[1:])
    filled = dataset.labels[:4].ravel()
    assert int((filled == -100).sum()) == 4 * 6 - (len(low) - 1) - len(b"ABCDEF")
    assert dataset.domains is not None
    assert dataset.domains[: dataset.train_size].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"text": ["abc"]}, None, "no column 'domain'; its columns are text"),
        ({"text": ["abcdefghi", ""], "domain": ["low", "low"]}, None, "row 1 of .* has no text"),
        ({"text": ["abcdefghi", "abc"], "domain": ["low", None]}, None, "row 1 of .* has no domain"),
        ({"text": ["abcdef", "ABCDEFGH"], "domain": ["low", "high"]}, None, "has 6 bytes, and a sample needs 7"),
        (None, {"text": ["abcdefghi"], "domain": ["low"]}, "'high' .* is not in both"),
        ({"text": [70, 80], "domain": ["low", "high"]}, None, "row 0 of .* has the type int in the column 'text'"),
        ({"text": [b"abcdefgh\xff", b"ABCDEFGH"], "domain": ["low", "high"]}, None, "row 0 of .* no UTF-8"),
    ],
)
def test_text_that_cannot_be_learned_is_refused_in_a_sentence(
    tmp_path: Path, train: Any, test: Any, message: str
) -> None:
    with pytest.raises(BecameError, match=message):
        load_text(folder_with(tmp_path, train, test), context=6)


def test_a_folder_of_other_data_and_a_short_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BecameError, match=r"holds no files train-\*.parquet"):
        load_text(tmp_path)
    with pytest.raises(BecameError, match="--context is 1"):
        load_text(None, context=1)


def test_the_text_of_python_has_three_domains() -> None:
    stream = BENCHMARKS["text-domains"].stream(load_text(None), 0, validation=0.0, seed=0, class_order="label")
    assert len(stream.tasks) == 3
    assert stream.shared_head
    assert stream.unit == "bits per byte"
    assert all(900 < len(task.train) < 1100 and 100 < len(task.test) < 130 for task in stream.tasks)
    for method, reason in {"hat": "share a head", "packnet": "share a head", "ogd": "no labels of samples"}.items():
        with pytest.raises(BecameError, match=reason):
            check_method(build_method(method), stream)
    for method in ("became", "became-paper", "sgp", "gpcns", "nscl", "ewc", "imm-mode", "coma", "joint"):
        check_method(build_method(method), stream)


@pytest.mark.parametrize(("name", "millions"), [("gpt", 0.3), ("gpt-medium", 3.3), ("gpt-large", 30.0)])
def test_the_transformers_have_about_as_many_weights_as_they_say(name: str, millions: float) -> None:
    network = build_network(name, (128,))
    weights = sum(int(np.prod(each.shape)) for each in network.parameters.values()) + 256 * network.width
    assert weights == pytest.approx(millions * 1e6, rel=0.1)


def test_networks_of_images_and_of_text_are_not_mistaken() -> None:
    with pytest.raises(BecameError, match="'mlp' is not for text"):
        build_network("mlp", (128,))
    with pytest.raises(BecameError, match="'gpt' is not for images"):
        build_network("gpt", (1, 28, 28))
    with pytest.raises(BecameError, match="none that could be 'group'"):
        build_network("gpt", (128,), "group")


def test_the_command_learns_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from adapters.cli.main import main
    from adapters.torch.run import BACKEND

    rows = {"text": ["ab" * 200, "xyz" * 150], "domain": ["two", "three"]}
    folder_with(tmp_path, rows, rows)
    words = ["--benchmark", "text-domains", "--data-dir", str(tmp_path), "--context", "16", "--epochs", "3"]
    words += ["--stage2-epochs", "1", "--lr", "0.01", "--batch-size", "8", "--out", str(tmp_path / "runs")]
    assert main(BACKEND, [*words, "--methods", "became", "finetune"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    for run in read_results(tmp_path / "runs"):
        assert run.unit == "bits per byte"
        assert 0 < run.loss[0, 0] < 4  # of 8 before it has learned anything
        assert run.accuracy[0, 0] > 40
        assert [len(texts) for texts in run.samples] == [1, 2]
        assert run.samples[0][0].startswith("abab")
        assert len(run.samples[1][1]) == 16
    page = report([tmp_path / "runs"]).read_text(encoding="utf-8")
    assert "What the network writes" in page
    assert f">{read_results(tmp_path / 'runs')[0].samples[0][0]}<" in page
    assert "Loss, bits per byte" in page
    assert main(BACKEND, [*words, "--network", "mlp", "--methods", "gpm"]) == 2
    assert "is not for text" in capsys.readouterr().err
