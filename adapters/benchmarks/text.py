"""Text by domain, a task for each domain: either each next byte is predicted, or a number that a text is rated with.

Without a folder the next byte is predicted of three domains that come with Python: English (the help's topics,
``pydoc_data.topics``), source code of its standard library, and the names of Unicode's characters. They are those of
the Python that runs, so the record of a run has their digest.

Convention: text is UTF-8. Where the next byte is predicted, the passages of a domain follow each other, an empty line
between two, and are cut into samples of ``context`` bytes; the labels are the same bytes, one ahead. The last sample of
a domain is filled up with zeros, whose labels are ignored. Of a rated text the first ``context`` bytes are a sample,
after zeros if it has fewer, so that the last byte of a sample is the text's.
"""

import importlib.util
import math
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.benchmarks.huggingface import rows_of_file
from adapters.benchmarks.parquet import split_files
from became_core.continual.data import Dataset
from became_core.curvature import Categorical, Gaussian
from became_core.errors import BecameError
from became_core.registry import Setting

__all__ = ["TEXT_SETTINGS", "load_rated_text", "load_text"]

TEXT_SETTINGS = {
    "context": Setting("context", int, 128, "how many bytes of text a sample has", ("text-domains", "text-sentiment")),
}

# Where the files may lie within a folder.
_FOLDERS = ("", "data", "text/domains/data")
_RATED = ("", "data", "text/sentiment/data")
_EMBEDDED = 150_000  # bytes of each domain that comes with Python
_PASSAGE = 1200
_MODULES = (
    "argparse",
    "ast",
    "dataclasses",
    "difflib",
    "doctest",
    "enum",
    "fractions",
    "inspect",
    "optparse",
    "pickle",
)
_IGNORED = -100

Texts = Mapping[str, Sequence[str]]


def load_text(data_dir: Path | None, *, context: int = 128) -> Dataset:
    """Return text, whose next byte is predicted: bytes [N, context], and of each the next one.

    Args:
        data_dir: a folder with ``train-*.parquet`` and ``test-*.parquet``, whose columns are ``text`` and ``domain``,
            or one that has it as ``data`` or ``text/domains/data``; None for the text that comes with Python.
        context: how many bytes a sample has.

    Raises:
        BecameError: if the folder lacks the files or a column, a cell is empty or no UTF-8, or a domain has fewer bytes
            than a sample needs.
    """
    if context < 2:
        raise BecameError(f"--context is {context}; a sample needs at least 2 bytes.")
    train, test = _embedded() if data_dir is None else _texts(data_dir)
    name = "text of Python" if data_dir is None else "text-domains"
    odd = sorted(set(train) ^ set(test))
    if odd:
        raise BecameError(f"the domain '{odd[0]}' of {name} is not in both the training and the test part.")
    images, labels, domains = [], [], []
    for part, texts in (("training", train), ("test", test)):
        for number, domain in enumerate(train):
            samples, following = _samples(texts[domain], context, f"the {part} part of the domain '{domain}'")
            images.append(samples)
            labels.append(following)
            domains.append(np.full(len(samples), number))
    return Dataset(
        name=name,
        images=np.concatenate(images),
        labels=np.concatenate(labels),
        train_size=sum(map(len, images[: len(train)])),
        mean=(),
        std=(),
        likelihood=Categorical(by="token", ignored=_IGNORED),
        domains=np.concatenate(domains),
    )


def _samples(texts: Sequence[str], context: int, what: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the samples of a domain, and the label of each byte; ``what`` is how messages call it."""
    text = np.frombuffer("\n\n".join(texts).encode(), np.uint8)
    if len(text) <= context:
        raise BecameError(f"{what} has {len(text)} bytes, and a sample needs {context + 1}; lower --context.")
    count = -(-(len(text) - 1) // context)
    samples, labels = np.zeros(count * context, np.uint8), np.full(count * context, _IGNORED)
    samples[: len(text) - 1], labels[: len(text) - 1] = text[:-1], text[1:]
    return samples.reshape(count, context), labels.reshape(count, context)


def load_rated_text(data_dir: Path | None, *, context: int = 128) -> Dataset:
    """Return texts, whose ratings are predicted: bytes [N, context], and of each text the number that it is rated with.

    Args:
        data_dir: a folder with ``train-*.parquet`` and ``test-*.parquet``, whose columns are ``text``, ``domain`` and
            ``rating``, or one that has it as ``data`` or ``text/sentiment/data``.
        context: how many bytes a sample has.

    Raises:
        BecameError: if there is no folder, it lacks the files or a column, a cell is empty, no UTF-8 or no finite
            number, or a domain is not in both parts.
    """
    if context < 2:
        raise BecameError(f"--context is {context}; a sample needs at least 2 bytes.")
    if data_dir is None:
        raise BecameError(
            "text-sentiment comes without data; name by --data-dir or BECAME_DATA_DIR a folder with train-*.parquet "
            "and test-*.parquet, whose columns are text, domain and rating."
        )
    train, test = (_rows(_files(data_dir, part, _RATED), "rating") for part in ("train", "test"))
    names = list(dict.fromkeys(domain for domain, _, _ in train))
    odd = sorted(set(names) ^ {domain for domain, _, _ in test})
    if odd:
        raise BecameError(f"the domain '{odd[0]}' of {data_dir} is not in both the training and the test part.")
    rows = train + test
    samples = np.zeros((len(rows), context), np.uint8)
    for sample, (_, text, _) in zip(samples, rows, strict=True):
        content = np.frombuffer(text.encode()[:context], np.uint8)
        sample[context - len(content) :] = content
    return Dataset(
        name="text-sentiment",
        images=samples,
        labels=np.array([[rating] for _, _, rating in rows]),
        train_size=len(train),
        mean=(),
        std=(),
        likelihood=Gaussian(noise=1.0),
        domains=np.array([names.index(domain) for domain, _, _ in rows]),
    )


def _files(folder: Path, part: str, places: Sequence[str], otherwise: str = "") -> Sequence[Path]:
    """Return the files of a part of the data; what else could be done ends the message if there are none."""
    within = [folder / name for name in places if any((folder / name).glob("train-*.parquet"))]
    if not within:
        raise BecameError(
            f"{folder} holds no files train-*.parquet, and neither do its folders {' and '.join(places[1:])}"
            f"{otherwise or '; name the folder that does'}."
        )
    return split_files(within[0], part)


def _texts(folder: Path) -> tuple[Texts, Texts]:
    """Return the texts of both parts of a folder, by domain."""
    otherwise = "; without --data-dir and BECAME_DATA_DIR the text is Python's own"
    parts: list[dict[str, list[str]]] = [{}, {}]
    for texts, part in zip(parts, ("train", "test"), strict=True):
        for domain, text, _ in _rows(_files(folder, part, _FOLDERS, otherwise)):
            texts.setdefault(domain, []).append(text)
    return parts[0], parts[1]


def _rows(files: Sequence[Path], number: str | None = None) -> list[tuple[str, str, float]]:
    """Return each row's domain, text and number, 0 if no column of numbers is named."""
    checked: list[tuple[str, str, float]] = []
    for file in files:
        rows = rows_of_file(file)
        columns = ["text", "domain"] if number is None else ["text", "domain", number]
        for column in columns:
            if column not in rows.column_names:
                raise BecameError(f"{file} has no column '{column}'; its columns are {', '.join(rows.column_names)}.")
        for place, (text, domain, *others) in enumerate(zip(*(rows[column] for column in columns), strict=True)):
            where = f"row {place} of {file}"
            if not text or domain in (None, ""):
                raise BecameError(f"{where} has no {'domain' if text else 'text'}; leave it out.")
            if number is not None and not _is_finite(others[0]):
                raise BecameError(f"{where} has the {number} {others[0]!r}; give a finite number.")
            checked.append((str(domain), _decoded(text, where), float(others[0]) if others else 0.0))
    return checked


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _decoded(text: Any, where: str) -> str:
    if isinstance(text, str):
        return text
    if not isinstance(text, bytes | bytearray | memoryview):
        raise BecameError(f"{where} has the type {type(text).__name__} in the column 'text'; save it as text.")
    try:
        return bytes(text).decode()
    except (TypeError, UnicodeDecodeError):
        raise BecameError(f"{where} holds bytes that are no UTF-8; save it as UTF-8.") from None


def _embedded() -> tuple[Texts, Texts]:
    """Return what comes with Python by domain, every tenth passage of it for testing."""
    from pydoc_data.topics import topics

    names = (unicodedata.name(chr(code), "") for code in range(0x20000))
    named = (name for name in names if name and not name.startswith(("CJK", "HANGUL SYLLABLE")))
    whole = {
        "english": "\n\n".join(topics[key] for key in sorted(topics)),
        "python": "\n\n".join(map(_source, _MODULES)),
        "unicode": "\n".join(islice(named, _EMBEDDED)),
    }
    train: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    for domain, text in whole.items():
        starts = range(0, min(len(text), _EMBEDDED), _PASSAGE)
        passages = [text[start : start + _PASSAGE] for start in starts]
        test[domain] = passages[::10]
        train[domain] = [passage for place, passage in enumerate(passages) if place % 10]
    return train, test


def _source(module: str) -> str:
    """Return the source code of a module of the standard library."""
    spec = importlib.util.find_spec(module)
    try:
        return Path(str(spec and spec.origin)).read_text(encoding="utf-8")
    except OSError:
        raise BecameError(
            f"this Python comes without the source code of {module}; give text by --data-dir instead."
        ) from None
