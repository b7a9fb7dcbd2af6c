"""Merging checkpoints from a disk: ``python benchmarks/checkpoints.py [--sizes 0.1 1 3] [--mergekit PYTHON] [--json]``.

Two synthetic Llama checkpoints in bfloat16, in five shards each, and a Fisher file in float32 for each, of as many
billion weights as ``--sizes`` says; they are written once into ``--folder``, and read from the page cache if they fit
there. Contenders, each a process of its own, in turn: ``read twice`` (the files that ``became`` reads, twice, into one
buffer), our ``linear`` and ``became``, and mergekit's ``linear``, if ``--mergekit`` names a Python that has mergekit
0.1.5 (``python -m venv mk && mk/bin/pip install mergekit==0.1.5``). ``--cold`` has every contender
read its inputs from the disk first. ``--scheduler`` adds ``became`` with one thread,
with two, and on a Dask cluster, whose processor time and memory are not counted. Given are medians over rounds:
seconds, seconds of processor time, the peak of resident memory as the system counts it (pages of mapped files
included), and the bytes read and written.

Convention: ratios are of seconds, ours over the other's; lower is better. On a machine that is busy with other things
the processor time tells more than the seconds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that the checkout is measured, installed or not

from adapters.checkpoints.tensors import safetensors_header  # noqa: E402

SHARDS = 5
VOCABULARY = 32_000
# Width and layers of a Llama model of about so many billion weights.
MODELS = {0.01: (128, 8), 0.1: (512, 21), 1.0: (1536, 32), 3.0: (2560, 36)}
READ = """
import sys
buffer = bytearray(2**24)
for _ in range(2):
    for name in sys.argv[1:]:
        with open(name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
"""


class Measured(NamedTuple):
    """One process.

    Attributes:
        seconds: from its start to its end.
        processor: seconds of processor time, of all threads, in user and system mode.
        peak: of its resident memory, in bytes.
    """

    seconds: float
    processor: float
    peak: int


def shapes(size: float) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama model."""
    width, layers = MODELS[size]
    inner = 8 * width // 3 // 128 * 128
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for k in range(layers):
        prefix = f"model.layers.{k}"
        for name in ("q", "k", "v", "o"):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = (width, width)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = (inner, width)
        tensors[f"{prefix}.mlp.up_proj.weight"] = (inner, width)
        tensors[f"{prefix}.mlp.down_proj.weight"] = (width, inner)
        tensors[f"{prefix}.input_layernorm.weight"] = (width,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (width,)
    return {**tensors, "model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}


def configuration(size: float) -> dict[str, Any]:
    """Return what mergekit asks of a model."""
    width, layers = MODELS[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 128 * 128,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write(
    file: Path, tensors: dict[str, tuple[int, ...]], word: str, dtype: Any, seed: int, *, holes: bool = False
) -> None:
    """Write random numbers; squares of them for a Fisher file. With holes: the first millions, and zeros on no disk."""
    if file.exists():
        return
    header, _ = safetensors_header([(name, word, shape) for name, shape in tensors.items()], {"format": "pt"})
    values = np.random.default_rng(seed).normal(size=2**22).astype(np.float32) * 0.02
    pattern = (values**2 if word == "F32" else values).astype(dtype).tobytes()
    left = sum(int(np.prod(shape)) for shape in tensors.values()) * np.dtype(dtype).itemsize
    temporary = file.with_suffix(".part")
    with temporary.open("wb") as opened:
        opened.write(header)
        while left and not (holes and opened.tell() > len(pattern)):
            left -= opened.write(pattern[:left])
        opened.truncate(opened.tell() + left)
    temporary.rename(file)


def prepare(folder: Path, size: float, *, holes: bool = False) -> tuple[list[Path], list[Path]]:
    """Write two models and their Fisher files (with holes), unless they are there, and return where they are."""
    tensors = shapes(size)
    names = list(tensors)
    models, fishers = [], []
    for k, letter in enumerate("AB"):
        model = folder / f"{size:g}" / letter
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(configuration(size)), encoding="utf-8")
        weight_map: dict[str, str] = {}
        for shard in range(SHARDS):
            file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
            part = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
            write(model / file, {name: tensors[name] for name in part}, "BF16", ml_dtypes.bfloat16, 100 * k + shard)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        fisher = model.with_name(f"F{letter}.safetensors")
        write(fisher, tensors, "F32", np.float32, 1000 + k, holes=holes)
        models.append(model)
        fishers.append(fisher)
    return models, fishers


def run(command: Sequence[str]) -> Measured:
    """Run a process to its end; its time and the peak of its memory."""
    with tempfile.TemporaryFile() as log:
        begin, peak = time.monotonic(), 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        while not done:
            # Not the peak that wait4 returns: it begins with that of this process, from which the other was forked.
            peak = max(peak, _highest(process.pid))
            time.sleep(0.02)
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.monotonic() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read().decode()[-2000:]}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak)


def _highest(process: int) -> int:
    """Return the peak of a process's resident memory so far, in bytes; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return max((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), default=0)


def contenders(
    folder: Path, models: Sequence[Path], fishers: Sequence[Path], mergekit: str | None, scheduler: str | None
) -> dict[str, list[str]]:
    """Return the command of each contender; what it writes is ``folder / "out"``."""
    out, two = str(folder / "out"), [str(model) for model in models]
    ours = [sys.executable, "-m", "adapters.cli", "merge", *two, "--out", out, "--quiet", "--memory", "512MiB"]
    files = [str(file) for model in models for file in sorted(model.glob("*.safetensors"))]
    commands = {
        "read twice": [sys.executable, "-c", READ, *files, *map(str, fishers)],
        "linear": [*ours, "--rule", "linear"],
        "became": [*ours, "--rule", "became", "--fisher", *map(str, fishers)],
    }
    if scheduler is not None:
        for way in (["--workers", "1"], ["--workers", "2"], ["--scheduler", scheduler]):
            commands[f"became {' '.join(way)}"] = [*commands["became"], *way]
    if mergekit is not None:
        plan = folder / "plan.yaml"
        entries = "".join(f"- model: {model}\n  parameters:\n    weight: 0.5\n" for model in two)
        plan.write_text(f"models:\n{entries}merge_method: linear\ndtype: bfloat16\n", encoding="utf-8")
        script = Path(mergekit).with_name("mergekit-yaml")
        commands["mergekit linear"] = [str(script), str(plan), out, "--no-copy-tokenizer", "--quiet"]
    return commands


def forget(file: Path) -> None:
    """Have the system drop a file from its page cache (Linux)."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)  # what is not yet written cannot be dropped
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(
    folder: Path,
    size: float,
    rounds: int,
    mergekit: str | None,
    scheduler: str | None,
    *,
    holes: bool = False,
    cold: bool = False,
) -> dict[str, Any]:
    """Return seconds, memory, bytes and ratios of one size."""
    models, fishers = prepare(folder, size, holes=holes)
    commands = contenders(folder, models, fishers, mergekit, scheduler)
    results: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            if cold:
                for file in (*fishers, *(file for model in models for file in model.iterdir())):
                    forget(file)
            results[name].append(run(command))
    shutil.rmtree(folder / "out", ignore_errors=True)
    seconds = {name: statistics.median(each.seconds for each in runs) for name, runs in results.items()}
    peaks = {name: statistics.median(each.peak for each in runs) for name, runs in results.items()}
    processor = {name: statistics.median(each.processor for each in runs) for name, runs in results.items()}
    ratios = {
        "became_over_reading_twice": seconds["became"] / seconds["read twice"],
        "became_over_reading_twice_processor": processor["became"] / processor["read twice"],
    }
    if mergekit is not None:
        ratios["linear_over_mergekit"] = seconds["linear"] / seconds["mergekit linear"]
        ratios["linear_over_mergekit_processor"] = processor["linear"] / processor["mergekit linear"]
    weights = sum(int(np.prod(shape)) for shape in shapes(size).values())
    moved = {"read twice": 24, "linear": 4 + 2, "became": 12 + 4 + 2, "mergekit linear": 4 + 2}
    gibibytes = {name: moved[name.partition(" --")[0]] * weights / 2**30 for name in results}
    return {
        "weights": weights,
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_bytes": peaks,
        "gibibytes": gibibytes,
        "ratios": ratios,
    }


def main() -> None:
    """Measure every size and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1], choices=sorted(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", help="a Python that has mergekit 0.1.5")
    parser.add_argument("--scheduler", help="of a Dask cluster: its address, or the absolute path of its file")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are kept; a temporary folder without it")
    parser.add_argument("--holes", action="store_true", help="Fisher files that take no room on the disk")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each contender")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        options_of_all = (options.rounds, options.mergekit, options.scheduler)
        ways = {"holes": options.holes, "cold": options.cold}
        results = {f"{size:g}": measure(folder, size, *options_of_all, **ways) for size in options.sizes}
    if options.json:
        print(json.dumps(results))
        return
    print("| weights | what | seconds | processor seconds | peak memory, MiB | GiB moved |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for result in results.values():
        for name, seconds in result["seconds"].items():
            peak, moved = result["peak_bytes"][name] / 2**20, result["gibibytes"][name]
            busy, billions = result["processor_seconds"][name], result["weights"] / 1e9
            print(f"| {billions:.2f} B | {name} | {seconds:.2f} | {busy:.2f} | {peak:.0f} | {moved:.1f} |")
        print("\n".join(f"  {name}: {ratio:.2f}" for name, ratio in result["ratios"].items()))


if __name__ == "__main__":
    main()
