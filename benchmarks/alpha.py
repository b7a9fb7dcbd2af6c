"""Speed and memory of alpha* and merging: ``python benchmarks/alpha.py [--frameworks …] [--device gpu] [--json]``.

Each framework runs in its own process and is compared with itself. Alpha* reads four models; its bandwidth is given as
a ratio to the bandwidth at which the same framework sums the same four models, in the same process, in turn with it.
Merging reads two models and writes one, and is compared with the sum of three. ``formula`` is the obvious three-line
expression. Extra memory is the rise of the process's peak during a call, as a share of one model; the result of a merge
is not counted. On a GPU, the memory is the number that the framework reports, if its count can restart with a call
(PyTorch).

With ``--by-leaf-size``, the benchmark instead measures eager alpha*, with its checks of values, at leaves of 10^3 to
10^7 elements. It prints the time as a ratio to that of the formula, and there a lower ratio is better.

Convention: float32. A higher ratio is better. Results are medians over rounds, and every contender runs in each round.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the checkout is measured, installed or not

LEAVES = 16
# How many leaves, of how many elements each.
LEAF_SIZES = ((300, 10**3), (300, 10**4), (300, 10**5), (300, 10**6), (3, 10**7), (30_000, 10**3))
EAGER = ("numpy", "torch", "jax", "tensorflow")
FRAMEWORKS = ("numpy", "torch", "torch-compiled", "jax", "tensorflow")
UNCOMPILED = ("numpy", "torch")
MEMORY = ("alpha", "formula", "merge")  # whose memory is measured, in this order
ON_GPU = ("torch", "torch-compiled", "jax", "cupy", "tensorflow")


class Framework(NamedTuple):
    """The operations of a framework that the benchmark needs.

    Attributes:
        make: returns an array of the framework, given one of NumPy.
        compiled: returns a compiled function, or the function itself where nothing is compiled.
        wait: returns a result once it is computed.
        sum_of: returns the sum of an array.
        extra: returns the bytes by which the peak of memory during a call is above the level before it.
    """

    make: Callable[[np.ndarray], Any]
    compiled: Callable[[Any], Any]
    wait: Callable[[Any], Any]
    sum_of: Callable[[Any], Any]
    extra: Callable[[Callable[[], Any]], float]


def framework(name: str, device: str) -> Framework:
    """Return the operations of a framework on the CPU or on a GPU."""
    if name == "numpy":
        return Framework(np.asarray, lambda f: f, lambda x: x, np.sum, extra_resident)
    if name.startswith("torch"):
        return _torch(name == "torch-compiled", device)
    if name == "jax":
        import jax

        extra = extra_resident if device == "cpu" else _unknown
        there = jax.devices("cpu" if device == "cpu" else "cuda")[0]
        return Framework(lambda x: jax.device_put(x, there), jax.jit, jax.block_until_ready, jax.numpy.sum, extra)
    if name == "cupy":
        import cupy

        return Framework(cupy.asarray, lambda f: f, _after(cupy.cuda.Device().synchronize), cupy.sum, _unknown)
    import tensorflow as tf

    def wait(result: Any) -> Any:
        return tf.nest.map_structure(lambda x: x.numpy() if x.shape.rank == 0 else x[:1].numpy(), result)

    extra = extra_resident if device == "cpu" else _unknown
    return Framework(tf.constant, lambda f: tf.function(f, jit_compile=True), wait, tf.reduce_sum, extra)


def _torch(compiles: bool, device: str) -> Framework:
    import torch

    compiled = (lambda f: torch.compile(f, fullgraph=True)) if compiles else (lambda f: f)
    if device == "cpu":
        return Framework(torch.from_numpy, compiled, lambda x: x, torch.sum, extra_resident)

    def extra(run: Callable[[], Any]) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    return Framework(lambda x: torch.from_numpy(x).cuda(), compiled, _after(torch.cuda.synchronize), torch.sum, extra)


def _after(synchronise: Callable[[], Any]) -> Callable[[Any], Any]:
    def wait(result: Any) -> Any:
        synchronise()
        return result

    return wait


def _unknown(_: Callable[[], Any]) -> float:
    return float("nan")


def models(make: Callable[[np.ndarray], Any], parameters: int) -> list[dict[str, Any]]:
    """Return theta_gp, theta_hat, fisher_old and fisher_new, in leaves of equal size."""
    rng = np.random.default_rng(0)
    size = parameters // LEAVES
    return [
        {f"layer{leaf}.weight": make(rng.random(size, dtype=np.float32)) for leaf in range(LEAVES)} for _ in range(4)
    ]


def measure(name: str, device: str, parameters: int, rounds: int) -> dict[str, float]:
    """Return the ratios of one framework."""
    from became_core import merge, optimal_alpha

    make, compiled, wait, sum_of, extra = framework(name, device)
    trees = models(make, parameters)
    leaves = list(trees[0])

    def totals(*trees: Any) -> Any:
        return [sum_of(tree[leaf]) for tree in trees for leaf in leaves]

    contenders: dict[str, Callable[[], Any]] = {
        "sum": _call(compiled(totals), trees),
        "alpha": _call(compiled(optimal_alpha), trees),
        "formula": _call(compiled(lambda *trees: formula(sum_of, *trees)), trees),
        "sum of three": _call(compiled(totals), trees[:3]),
        "merge": _call(compiled(lambda gp, hat: merge(gp, hat, 0.3)), trees[:2]),
    }
    model = parameters * 4
    # An allocator keeps what a first run takes, and later ones seem to need less. But a compiler's first run compiles.
    memory = _memory(contenders, wait, extra) if name in UNCOMPILED else {}
    values = {}
    for contender, run in contenders.items():  # a first run compiles, and no round pays for new memory pages
        values[contender] = wait(run())
    assert abs(float(values["alpha"]) - float(values["formula"])) < 1e-4
    seconds = _in_turn(contenders, wait, rounds)
    median = {contender: float(np.median(times)) for contender, times in seconds.items()}
    memory = memory or _memory(contenders, wait, extra)
    return {
        "alpha_over_sum_bandwidth": float(np.median(np.divide(seconds["sum"], seconds["alpha"]))),
        "formula_over_sum_bandwidth": float(np.median(np.divide(seconds["sum"], seconds["formula"]))),
        "merge_over_sum_bandwidth": float(np.median(np.divide(seconds["sum of three"], seconds["merge"]))),
        "sum_gigabytes_per_second": 4 * model / median["sum"] / 1e9,
        "alpha_extra_memory": memory["alpha"] / model,
        "formula_extra_memory": memory["formula"] / model,
        "merge_extra_memory": memory["merge"] / model - 1,
        "alpha_seconds": median["alpha"],
    }


def _memory(
    contenders: dict[str, Callable[[], Any]], wait: Callable[[Any], Any], extra: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    """Return the bytes that each call needs beyond what the process has."""
    return {name: extra(partial(_waited, contenders[name], wait)) for name in MEMORY}


def _waited(run: Callable[[], Any], wait: Callable[[Any], Any]) -> Any:
    return wait(run())


def formula(sum_of: Callable[[Any], Any], gp: Any, hat: Any, old: Any, new: Any) -> Any:
    """Return alpha* by the obvious expression, without this project."""
    top = sum(sum_of((hat[leaf] - gp[leaf]) ** 2 * new[leaf]) for leaf in gp)
    return top / (top + sum(sum_of((hat[leaf] - gp[leaf]) ** 2 * old[leaf]) for leaf in gp))


def measure_leaf_sizes(name: str, device: str, rounds: int) -> dict[str, float]:
    """Return the ratio of alpha*'s time to the formula's, both eager, for each of the leaf sizes."""
    from became_core import optimal_alpha

    make, _, wait, sum_of, _ = framework(name, device)
    ratios = {}
    for count, size in LEAF_SIZES:
        rng = np.random.default_rng(0)
        # Leaves share sixteen arrays. No cache can hold sixteen large ones, and more would only take time to make.
        arrays = [[make(rng.random(size, dtype=np.float32)) for _ in range(min(count, 16))] for _ in range(4)]
        trees = [{f"layer{leaf}.weight": tree[leaf % 16] for leaf in range(count)} for tree in arrays]
        contenders = {"alpha": _call(optimal_alpha, trees), "formula": _call(formula, [sum_of, *trees])}
        values = {contender: float(wait(run())) for contender, run in contenders.items()}
        # The formula adds one leaf after another in single precision, and so loses digits.
        assert abs(values["alpha"] - values["formula"]) < 1e-4, values
        seconds = _in_turn(contenders, wait, rounds)
        ratios[f"alpha_over_formula_{count}x{size}"] = float(np.median(np.divide(seconds["alpha"], seconds["formula"])))
    return ratios


def _in_turn(
    contenders: dict[str, Callable[[], Any]], wait: Callable[[Any], Any], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each contender in every round."""
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender, run in contenders.items():
            began = time.perf_counter()
            wait(run())
            seconds[contender].append(time.perf_counter() - began)
    return seconds


def _call(function: Callable[..., Any], arguments: list[Any]) -> Callable[[], Any]:
    return lambda: function(*arguments)


def extra_resident(run: Callable[[], Any]) -> float:
    """Return the bytes by which the peak of the process's resident memory is above its level before (Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    Path("/proc/self/clear_refs").write_text("5")  # this resets the peak
    before = _status("VmRSS")
    result = run()  # it must stay alive until the peak is read
    after = _status("VmHWM")
    del result
    return max(after - before, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Measure each framework in its own process, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--frameworks", nargs="+", choices=sorted({*FRAMEWORKS, *ON_GPU}))
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--by-leaf-size", action="store_true", help="measure eager alpha* at many leaf sizes")
    parser.add_argument("--json", action="store_true", help="print one object of ratios by framework")
    options = parser.parse_args()
    on_device = FRAMEWORKS if options.device == "cpu" else ON_GPU
    frameworks = options.frameworks or [name for name in on_device if name in EAGER or not options.by_leaf_size]
    if os.environ.get("BECAME_BENCHMARK_CHILD"):
        if options.by_leaf_size:
            print(json.dumps(measure_leaf_sizes(frameworks[0], options.device, options.rounds)))
        else:
            print(json.dumps(measure(frameworks[0], options.device, options.parameters, options.rounds)))
        return
    results = {}
    for name in frameworks:
        command = [sys.executable, __file__, "--frameworks", name, "--device", options.device]
        command += ["--parameters", str(options.parameters), "--rounds", str(options.rounds)]
        command += ["--by-leaf-size"] * options.by_leaf_size
        environment = {**os.environ, "BECAME_BENCHMARK_CHILD": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        results[name] = json.loads(done.stdout.splitlines()[-1])
    if options.json:
        print(json.dumps(results, indent=2))
        return
    columns = list(next(iter(results.values()))) if results else []
    print("| framework | " + " | ".join(column.replace("_", " ") for column in columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name, ratios in results.items():
        print(f"| {name} | " + " | ".join(f"{ratios[column]:.2f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
