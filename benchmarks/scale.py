"""How cost grows with processes, tasks and widths: ``python benchmarks/scale.py alpha|epoch|tasks|paper``.

- ``alpha``: alpha* of models that several processes share as PyTorch's ``DTensor``, over gloo.
- ``epoch``: an epoch of the AlexNet-like network whose batches several processes share, beside a plain loop with
  ``DistributedDataParallel``, in turn in the same processes.
- ``tasks``: whole runs of ``became`` on GPM over 5, 20 and 80 tasks, and over networks of 1, 2 and 4 times the width;
  a power law is fitted to what they cost.
- ``paper``: what a large cluster would spend, by arithmetic from the constants below. Nothing is run.

Convention: float32, and one thread in each process. Seconds of several processes are those of the slowest. Processor
seconds are those of the busiest process, all its threads together; beside other work they say more than seconds. Bytes
are those that the kernel counted on the TCP connections of all processes (Linux). Results are medians over rounds.
"""

import argparse
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# So that this checkout is measured, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.networks import Architecture, Flatten, Linear, ReLU
from adapters.torch.learner import TorchLearner
from adapters.torch.run import BACKEND, build_learner
from adapters.torch.share import ProcessShare
from became_core import optimal_alpha
from became_core.continual import (
    SGD,
    Annealed,
    Batch,
    Constraint,
    Dataset,
    RunRecord,
    Share,
    TaskStream,
    Training,
    build_method,
    learn,
    split_classes,
)
from benchmarks.alpha import LEAVES, extra_resident
from benchmarks.frameworks import CLASSES, RATE, chunks, half_width, images
from benchmarks.plain_loops import torch_loop

COLUMNS, BLOCKS = 1250, 4  # of every leaf in ``alpha``; up to as many processes as blocks of rows share it
MARGIN = 6 * 2**30  # bytes of memory that are left to other programs

# In ``tasks``: images [SIDE, SIDE], of which each class has so many to train and to test on.
TASKS, WIDTHS, HIDDEN, SIDE, TRAIN, TEST = (5, 20, 80), (1, 2, 4), 256, 16, 160, 32


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``work(rank, count, *arguments)`` returns in each of so many new processes, which form a group."""
    with TemporaryDirectory() as folder, ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        calls = [pool.submit(_joined, rank, count, folder, work, arguments) for rank in range(count)]
        return [call.result() for call in calls]


def _joined(rank: int, count: int, folder: str, work: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    BACKEND.prepare()
    torch.set_num_threads(1)
    meeting = f"file://{folder}/store"
    distributed.init_process_group("gloo", meeting, timedelta(minutes=5), world_size=count, rank=rank)
    try:
        return work(rank, count, *arguments)
    finally:
        distributed.destroy_process_group()


def sent() -> int:
    """Return the bytes that this process has sent through its TCP connections so far, as the kernel counts them."""
    total = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        if not descriptor.is_socket():
            continue
        with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
            if connection.family != socket.AF_UNIX and connection.type == socket.SOCK_STREAM:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)
                total += struct.unpack_from("Q", information, 200)[0]  # tcpi_bytes_sent of linux/tcp.h
    return total


def in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float, int]]]:
    """Return seconds, processor seconds and bytes sent of this process, by run and round; all processes call it."""
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            distributed.barrier()
            before, processor, began = sent(), time.process_time(), time.perf_counter()
            run()
            seconds, used = time.perf_counter() - began, time.process_time() - processor
            if number:  # the first round warms up
                taken[name].append((seconds, used, sent() - before))
    return taken


class Cost(NamedTuple):
    """What a call cost all processes.

    Attributes:
        seconds: of the slowest process, by round.
        processor: processor seconds of the busiest process, by round.
        sent: bytes that all processes sent together.
    """

    seconds: NDArray[np.float64]
    processor: NDArray[np.float64]
    sent: float


def costs(by_process: Sequence[dict[str, list[tuple[float, float, int]]]]) -> dict[str, Cost]:
    """Return the cost by run, given what each process measured."""
    result = {}
    for name in by_process[0]:
        numbers = np.array([taken[name] for taken in by_process])  # [processes, rounds, 3]
        slowest, total = numbers.max(0), numbers.sum(0)
        result[name] = Cost(slowest[:, 0], slowest[:, 1], float(np.median(total[:, 2])))
    return result


def alpha_of(rank: int, count: int, weights: int, dtype: torch.dtype, rounds: int) -> Any:
    """Return alpha* of four models of so many weights, and what it cost; the numbers are those of any count."""
    mesh = DeviceMesh("cpu", list(range(count)))
    rows = weights // (LEAVES * COLUMNS * BLOCKS)  # of a block
    own = range(BLOCKS * rank // count, BLOCKS * (rank + 1) // count)
    models: list[dict[str, Any]] = [{} for _ in range(4)]
    for number, model in enumerate(models):
        for leaf in range(LEAVES):
            part = torch.empty(len(own) * rows, COLUMNS, dtype=dtype)
            for block, values in zip(own, torch.split(part, rows), strict=True):
                seed = (number * LEAVES + leaf) * BLOCKS + block
                values.uniform_(generator=torch.Generator().manual_seed(seed))
            model[f"layer{leaf}.weight"] = DTensor.from_local(part, mesh, [Shard(0)])
    taken = in_turn({"alpha": lambda: optimal_alpha(*models)}, rounds)
    return float(optimal_alpha(*models)), taken


def alpha_lines(sizes: Sequence[int], processes: Sequence[int], dtype: str, rounds: int) -> Iterator[str]:
    """Yield the lines of the table of ``alpha``."""
    yield "| weights | processes | seconds | processor seconds | bytes sent, all processes | alpha* |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: |"
    kind: torch.dtype = getattr(torch, dtype)
    for weights in sizes:
        needed, free = 4 * kind.itemsize * weights, free_memory()
        if needed + MARGIN > free:
            yield (
                f"\n{weights:.0e} weights in {dtype} were left out: four models take {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free, of which {MARGIN / 2**30:.0f} stay free."
            )
            continue
        values = []
        for count in processes:
            results = in_processes(count, alpha_of, weights, kind, rounds)
            cost = costs([taken for _, taken in results])["alpha"]
            values += [value for value, _ in results]
            yield (
                f"| {weights:.0e} | {count} | {np.median(cost.seconds):.3g} | {np.median(cost.processor):.3g} | "
                f"{cost.sent:.0f} | {values[-1]:.6f} |"
            )
        assert np.ptp(values) < 1e-5, values  # the same sums, added in another order


def free_memory() -> int:
    """Return the bytes of memory that new programs can have (Linux)."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def epochs_of(rank: int, count: int, rounds: int) -> Any:
    """Return what an epoch costs: free and projected by this library, and in a plain loop with DDP."""
    stream = images()
    dataset, steps = stream.dataset, chunks(stream.tasks[1].train)
    share = ProcessShare(rank, count) if count > 1 else Share()
    scaled = ((dataset.images / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).astype(np.float32)
    plain = torch_loop(scaled, stream.targets, CLASSES, "cpu", distributed=True)
    learner = build_learner("alexnet", stream, "cpu", 0)
    learner.share = share
    free = Constraint(frozenset(learner.parameters()) - learner.heads[0])
    projected = Constraint(learner.projectable | learner.heads[1], half_width(learner))

    def train(constraint: Constraint) -> None:
        batches = [Batch(1, rows) for rows in steps]
        learner.train(batches, np.full(len(batches), RATE), constraint, SGD(), np.random.default_rng(0))

    runs: dict[str, Callable[[], Any]] = {
        "plain DDP": partial(plain.train, [rows[share.rows(len(rows))] for rows in steps]),
        "free": partial(train, free),
        "projected by GPM": partial(train, projected),
    }
    return len(steps), in_turn(runs, rounds)


def epoch_lines(processes: Sequence[int], rounds: int) -> Iterator[str]:
    """Yield the lines of the table of ``epoch``."""
    yield "| processes | epoch | seconds | over DDP | processor seconds | over DDP | bytes sent a step, all processes |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for count in processes:
        results = in_processes(count, epochs_of, rounds)
        by_run = costs([taken for _, taken in results])
        plain = by_run["plain DDP"]
        for name, cost in by_run.items():
            times = [(float(np.median(a)), float(np.median(a / b))) for a, b in zip(cost[:2], plain[:2], strict=True)]
            cells = " | ".join(f"{seconds:.3g} | {ratio:.2f}" for seconds, ratio in times)
            yield f"| {count} | {name} | {cells} | {cost.sent / results[0][0]:.0f} |"


def synthetic(tasks: int) -> TaskStream:
    """Return tasks of two classes, each of which has its images along three directions of its own."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(tasks, 3, SIDE * SIDE))
    labels = np.tile(np.arange(2 * tasks), TRAIN + TEST)
    along = rng.normal(size=(len(labels), 3))
    along[:, 0] += np.where(labels % 2, 2, -2)
    pixels = 127 + 20 * np.einsum("nk,nkd->nd", along, directions[labels // 2]) + rng.normal(size=(len(labels), 1))
    pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).reshape(-1, 1, SIDE, SIDE)
    return split_classes(Dataset("synthetic", pixels, labels, 2 * tasks * TRAIN, (0.5,), (0.3,)), tasks, validation=0)


def run_of(_rank: int, _count: int, tasks: int, hidden: int) -> dict[str, float]:
    """Return what one run costs: processor seconds by phase, bytes stored, and the rise of resident memory."""
    training = Training(Annealed(0.05, 2), Annealed(0.05, 1), batch_size=32)
    records: list[RunRecord] = []

    def run(tasks: int, hidden: int) -> tuple[TorchLearner, float]:
        stream = synthetic(tasks)
        layers = (Flatten(), Linear("fc1", hidden), ReLU(), Linear("fc2", hidden), ReLU())
        learner = TorchLearner(Architecture(layers, stream.dataset.images.shape[1:]), stream)
        # A run's own stopwatch then reads processor seconds, since other processes are busy.
        with mock.patch.object(time, "perf_counter", time.process_time):
            method = build_method("became+gpm")
            rise = extra_resident(lambda: records.append(learn(learner, stream, method, training)))
        return learner, rise

    run(2, 16)  # loads what PyTorch loads late; a small network leaves no memory that the next one would take again
    learner, rise = run(tasks, hidden)
    record = records[-1]
    weights = sum(math.prod(value.shape) for value in learner.parameters().values())
    seconds = record.seconds | {"all but evaluation": record.seconds["total"] - record.seconds["evaluation"]}
    numbers = {f"processor seconds, {phase}": number for phase, number in seconds.items()}
    return {"weights": weights, "bytes stored": record.memory[-1], "rise of memory, bytes": rise} | numbers


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent of the power law that fits best, by least squares of logarithms.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def run_lines(tasks: Sequence[int], widths: Sequence[int]) -> Iterator[str]:
    """Yield the lines of the tables of ``tasks``; the exponents of the second one are by weights."""
    settings = {"tasks": [(count, HIDDEN) for count in tasks], "width": [(tasks[0], 2 * HIDDEN * w) for w in widths]}
    for what, pairs in settings.items():
        runs = [in_processes(1, run_of, *pair)[0] for pair in pairs]
        sizes = [run["weights"] for run in runs] if what == "width" else tasks
        heads = [str(pair[what == "width"]) for pair in pairs]
        yield f"\n| {what} | {' | '.join(heads)} | exponent |"
        yield "| --- |" + " ---: |" * (len(sizes) + 1)
        for name in runs[0]:
            values = [run[name] for run in runs]
            yield f"| {name} | {' | '.join(f'{v:.3g}' for v in values)} | {exponent(sizes, values):.2f} |"


# What ``paper`` computes with. Measured on one H100 unless said otherwise, in float32.
GPUS = 64 * 8
NETWORK = 400e9 / 8  # bytes a second into a node, and out of it: data sheet, taken as reached
SUM = 1.42e12  # bytes a second that PyTorch's own sum reads
EAGER, COMPILED = 0.18 * SUM, 1.3 * SUM  # alpha* by PyTorch, and by JAX under jit; data sheet of the memory: 3.35e12
LEAF = 16 * 1e8 / EAGER / LEAVES  # seconds of eager alpha* a leaf: four models of 1e8 weights, nearly all of it Python
# Projecting took 1/798 - 1/872 seconds of a captured step. Its two products are 4 x rows x width x rank operations; the
# rows are a convolution's outputs or a linear layer's batch, and the rank is half of the width.
PROJECTED = ((64, 48), (128, 576), (256, 512), (64, 1024), (64, 2048))
PRODUCTS = sum(4 * rows * width * (width // 2) for rows, width in PROJECTED) / (1 / 798 - 1 / 872)
# Of a GPT on one CPU core (benchmarks/own_loop.py): forward passes that ``remember`` takes, and those without squares
# and Gram matrices, and for squares alone.
REMEMBER, PASSES, SQUARES = 4.5, 2.3, 1.3
MODEL = 0.4 * 989e12  # operations a second of passes: assumed share of the data sheet's dense bfloat16
EIGEN, EIGEN_RATE = 9, 1e12  # operations of an eigendecomposition over width^3, and a second: assumed
LATENCY = 1e-3  # seconds of a small all-reduce over 512 GPUs: assumed
TOKENS, BATCH = 1e7, 4e6  # of a task that are measured, and of a training step: assumed


class Transformer(NamedTuple):
    """A Llama-like model: its layers, the width, that within a layer, that of keys and values, and the vocabulary."""

    layers: int
    width: int
    inner: int
    keys: int
    vocabulary: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The matrices [d_out, d_in] of a layer."""
        d, keys, inner = self.width, self.keys, self.inner
        return [(d, d), (d, d), (keys, d), (keys, d), (inner, d), (inner, d), (d, inner)]


MODELS = {"7B": Transformer(32, 4096, 11008, 4096, 32000), "70B": Transformer(80, 8192, 28672, 1024, 32000)}


def spent(model: Transformer) -> dict[str, float]:
    """Return what 64 nodes of 8 GPUs would spend on a model that ``fully_shard`` shards over all: seconds or bytes."""
    weights = model.layers * sum(a * b for a, b in model.matrices) + 2 * model.vocabulary * model.width
    leaves = model.layers * (len(model.matrices) + 2) + 3  # with norms, the embedding and the head
    own = weights / GPUS
    products = model.layers * sum(4 * out * width * (width // 4) for out, width in model.matrices) / GPUS
    projection = products / PRODUCTS + 7 * 4 * own / SUM  # the weights are copied, subtracted and changed: 7 accesses
    forward = 2 * weights * TOKENS / GPUS / MODEL
    whole = 4 * weights / NETWORK  # every node gets, or gives, a whole model once
    grams = model.layers * sum(4 * width**2 for _, width in model.matrices)
    eigen = [EIGEN * width**3 / EIGEN_RATE for _, width in model.matrices]
    return {
        "weights": weights,
        "a training step, s": 6 * weights * BATCH / GPUS / MODEL,
        "projection of a step, captured, ms": 1e3 * projection,
        "projection of a step, eager, ms": 1e3 * (projection + LEAF * model.layers * len(model.matrices)),
        "statistics: passes, s": REMEMBER * forward,
        "statistics: gather weights, scatter Fisher, s": 2 * whole,
        "statistics: sum Gram matrices, s": 2 * grams / NETWORK,
        "statistics: eigenvectors, in every process, s": model.layers * sum(eigen),
        "the same, shared out, s": max(model.layers * sum(eigen) / GPUS, *eigen),
        "merge: passes for the new curvature and slope, s": (PASSES + SQUARES + 3) * forward,
        "merge: gather weights and direction, scatter Fisher, s": 3 * whole,
        "alpha*, eager, ms": 1e3 * (16 * own / EAGER + LEAF * leaves + LATENCY),
        "alpha*, compiled, ms": 1e3 * (16 * own / COMPILED + LATENCY),
        "merged weights, ms": 1e3 * 12 * own / SUM,
        "memory of a process in statistics, GB": (8 * weights + grams + grams / 4) / 1e9,
        "of it, the bases, GB": grams / 4 / 1e9,
    }


def paper_lines() -> Iterator[str]:
    """Yield the lines of the table of ``paper``."""
    columns = [spent(model) for model in MODELS.values()]
    yield f"| what | {' | '.join(MODELS)} |"
    yield "| --- |" + " ---: |" * len(MODELS)
    for name in columns[0]:
        yield f"| {name} | {' | '.join(f'{column[name]:.3g}' for column in columns)} |"


def main() -> None:
    """Measure one part, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("part", choices=("alpha", "epoch", "tasks", "paper"))
    parser.add_argument("--weights", type=float, nargs="+", default=[1e7, 1e8, 1e9], help="of a model, in alpha")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the models in alpha")
    parser.add_argument("--processes", type=int, nargs="+", help="1, 2 and 4 in alpha, 1 and 2 in epoch")
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "alpha": lambda: alpha_lines(
            [int(size) for size in options.weights], options.processes or (1, 2, 4), options.dtype, options.rounds
        ),
        "epoch": lambda: epoch_lines(options.processes or (1, 2), options.rounds),
        "tasks": lambda: run_lines(options.tasks, options.widths),
        "paper": paper_lines,
    }
    for line in parts[options.part]():
        print(line, flush=True)


if __name__ == "__main__":
    main()
