"""The memory of a merge is a few slabs, whatever the size of the models (issues 20, 107, 157 and 549 of mergekit)."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MEASURED = """
import sys
from pathlib import Path
from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints
from adapters.checkpoints.resources import resident
folder, memory = Path(sys.argv[1]), int(sys.argv[2])
models = tuple(PlannedModel(folder / f"{n}.safetensors", fisher=folder / f"F{n}.safetensors") for n in "AB")
highest = 0
def progress(what, done, whole):
    global highest
    highest = max(highest, resident())
report = merge_checkpoints(MergePlan(models), folder / "out", memory=memory, workers=2, progress=progress)
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
print(highest, peak, report.bytes_written)
"""


def sparse(file: Path, word: str, item: int, rows: int, *, fisher: bool) -> None:
    """A checkpoint that claims much more than it holds on the disk: zeros, and a few weights that differ."""
    shape, count = [rows, 1024], rows * 1024
    text = json.dumps({"w.weight": {"dtype": word, "shape": shape, "data_offsets": [0, count * item]}}).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        begin = opened.tell()
        opened.truncate(begin + count * item)
        if fisher:
            opened.seek(begin)
            opened.write(np.ones(1000, np.float32).tobytes())


@pytest.mark.skipif(sys.platform != "linux", reason="the resident memory is read from /proc")
def test_a_large_merge_stays_within_the_memory_it_is_given(tmp_path: Path) -> None:
    rows, memory = 32 * 1024, 160 * 2**20  # 64 MiB in bfloat16, 128 MiB in float32
    for name in "AB":
        sparse(tmp_path / f"{name}.safetensors", "BF16", 2, rows, fisher=False)
        sparse(tmp_path / f"F{name}.safetensors", "F32", 4, rows, fisher=True)
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(memory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    highest, peak, written = map(int, done.stdout.split())
    assert written > 64 * 2**20
    assert highest <= memory
    # The peak of the whole process has the files of its libraries too, but no model of 384 MiB in all.
    assert peak <= memory + 100 * 2**20
