"""Whatever happens to an input: it is refused in one sentence, or it is merged as it now is; nothing else."""

import os
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file

from adapters.checkpoints import merge_checkpoints, read_plan
from became_core import BecameError
from tests.checkpoints.models import arrays, pair

pytest.importorskip("yaml")
# Damaged inputs of each kind; `nox -s stress` damages many more.
EXAMPLES = int(os.environ.get("BECAME_DAMAGES", "40"))
# Fewer than the header of a file may claim, and more than these small merges ever need.
MOST_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pair(folder)
        values = arrays(5)
        np.savez(folder / "C.npz", **values)  # type: ignore[arg-type]
        np.savez_compressed(folder / "D.npz", **values)  # type: ignore[arg-type]
        return {file.name: file.read_bytes() for file in folder.iterdir()}


@st.composite
def damages(draw: st.DrawFn) -> tuple[float, Any]:
    """Where in a file, and what happens there."""
    place = draw(st.floats(0, 1, exclude_max=True))
    near_begin = draw(st.booleans())
    what = draw(
        st.one_of(
            st.just("cut"),
            st.binary(min_size=1, max_size=8),
            st.tuples(st.just("insert"), st.binary(min_size=1, max_size=8)),
            st.tuples(st.just("drop"), st.integers(1, 40)),
            st.tuples(st.just("digit"), st.integers(0, 9)),
            st.tuples(st.just("word"), st.sampled_from([b"F64", b"I8", b"BF16", b"{}", b"-1", b"9" * 30, b"\xff"])),
        )
    )
    return place * (0.2 if near_begin else 1.0), what


def damaged(content: bytes, damage: tuple[float, Any]) -> bytes:
    place, what = int(damage[0] * len(content)), damage[1]
    if what == "cut":
        return content[:place]
    if isinstance(what, bytes):
        return content[:place] + what + content[place + len(what) :]
    kind: str = what[0]
    value: Any = what[1]
    if kind == "insert":
        return b"".join([content[:place], value, content[place:]])
    if kind == "drop":
        return content[:place] + content[place + value :]
    if kind == "word":
        return b"".join([content[:place], value, content[place + len(value) :]])
    digits = [k for k in range(place, min(place + 400, len(content))) if content[k : k + 1].isdigit()]
    at = digits[0] if digits else 0
    return content[:at] + str(value).encode() + content[at + 1 :]


@settings(max_examples=EXAMPLES)
@given(name=st.sampled_from(["A.safetensors", "B.safetensors", "FA.safetensors"]), damage=damages())
def test_a_damaged_safetensors_file_is_refused_or_read_as_its_own_library_reads_it(
    files: dict[str, bytes], name: str, damage: tuple[float, Any]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = pair(folder)
        (folder / name).write_bytes(damaged(files[name], damage))
        accepted = _merged(plan, folder)
        if accepted:
            try:
                load_file(folder / name)
            except (SafetensorError, TypeError, ValueError, KeyError) as error:  # what its library refuses
                pytest.fail(f"accepted what safetensors refuses: {error}")


@settings(max_examples=EXAMPLES)
@given(name=st.sampled_from(["C.npz", "D.npz"]), damage=damages())
def test_a_damaged_archive_is_refused_or_merged(files: dict[str, bytes], name: str, damage: tuple[float, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = pair(folder)
        (folder / name).write_bytes(damaged(files[name], damage))
        first, second = plan.models
        _merged(plan.replaced(models=(type(first)(folder / name, fisher=first.fisher), second)), folder)


@settings(max_examples=EXAMPLES)
@given(damage=damages())
def test_a_damaged_plan_is_refused_or_merged(damage: tuple[float, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = pair(folder)
        text = "models:\n" + "".join(
            f"- model: {model.model}\n  fisher: {model.fisher}\n  parameters: {{weight: [1.0, 0.5]}}\n"
            for model in plan.models
        )
        file = folder / "plan.yaml"
        file.write_bytes(damaged(f"{text}merge_method: became\nper: layer\nout_dtype: float32\n".encode(), damage))
        try:
            read = read_plan(file)
        except BecameError as error:
            check_sentence(error)
            return
        _merged(read, folder)


def check_sentence(error: BecameError) -> None:
    assert "\n" not in str(error)
    assert str(error).endswith(".")


def _merged(plan: Any, folder: Path) -> bool:
    """Merge; return whether anything was written. If not, there is a sentence, and never is memory above the bound."""
    before = sorted(folder.iterdir())
    tracemalloc.start()
    try:
        merge_checkpoints(plan, folder / "out", workers=1)
    except BecameError as error:
        check_sentence(error)
        return sorted(folder.iterdir()) != before
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES
    assert sorted(folder.iterdir()) == sorted([*before, folder / "out"])
    return True
