"""``became doctor``: what this installation has, what it lacks, and the command that installs that.

It needs no framework. What cannot be imported is a line of the report and not an error.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from adapters.backend.entry import BACKENDS, available_threads
from adapters.benchmarks.location import VARIABLE, data_directory

__all__ = ["diagnosis"]

# By extra of this project, the packages that it adds and what they are for.
EXTRAS = {
    "torch": (("torch",), "runs on PyTorch"),
    "jax": (("jax", "flax", "optax"), "runs on JAX"),
    "tensorflow": (("tensorflow", "keras"), "runs on TensorFlow"),
    "report": (("matplotlib",), "became report"),
    "tensorboard": (("tensorboardX",), "--tracker tensorboard"),
    "trackio": (("trackio",), "--tracker trackio"),
    "merge": (("ml_dtypes", "yaml"), "became merge, without a framework"),
    "transformers": (("transformers",), "--network hf:NAME"),
    "timm": (("timm",), "--network timm:NAME"),
    "dask": (("distributed",), "--scheduler"),
    "flower": (("flwr",), "adapters.flower, federations"),
}
ALWAYS = ("became", "numpy", "array-api-compat", "optree", "safetensors", "tyro", "rich", "datasets")
# How long a framework may take to be loaded, on a machine that does other things too.
SECONDS = 180
# By framework, a program that prints its version and its devices, as it calls them.
PROGRAMS = {
    "torch": """
import torch
names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
threads = torch.get_num_threads()
print(f"{torch.__version__}: {', '.join(names)}; {threads} thread{'' if threads == 1 else 's'} unless told otherwise")
""",
    "jax": """
import jax
print(f"{jax.__version__}: {', '.join(map(str, jax.devices()))}")
""",
    "tensorflow": """
import tensorflow
print(f"{tensorflow.__version__}: {', '.join(each.name for each in tensorflow.config.list_logical_devices())}")
""",
}
# By benchmark, the folders that it can be in, within a folder of data.
FOLDERS = {
    "split-cifar100": ("uoft-cs/cifar100",),
    "split-tinyimagenet": ("zh-plus/tiny-imagenet", "tiny-imagenet-200"),
    "split-miniimagenet": ("mini-imagenet",),
    "split-imagenet-r": ("imagenet-r",),
    "text-domains": ("text/domains",),
    "text-sentiment": ("text/sentiment",),
}


def diagnosis() -> str:
    """Return what is there and what is missing, in lines for a person."""
    sections = {
        "This machine": _machine(),
        "Packages": _packages(),
        "Frameworks": _frameworks(),
        "Data": _data(),
        "Not installed": _missing(),
    }
    return "\n\n".join("\n".join([f"{title}:", *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def _machine() -> Iterator[str]:
    yield f"Python {platform.python_version()}, {sys.executable}"
    yield f"{platform.system()} {platform.machine()}"
    said = os.environ.get("OMP_NUM_THREADS")
    yield f"{available_threads()} cores; OMP_NUM_THREADS is {said or 'not set'}; a small network takes {said or 'one'}"


def _packages() -> Iterator[str]:
    for name in ALWAYS:
        yield f"{name} {_version(name)}"


def _frameworks() -> Iterator[str]:
    installed = [name for name in BACKENDS if find_spec(name) is not None]
    if not installed:
        yield f"none; pip install 'became[{BACKENDS[0]}]', or with {' or '.join(BACKENDS[1:])} in its place"
    for name in installed:
        yield f"{name} {_asked(name)}"


def _asked(framework: str) -> str:
    """Return the version and the devices of a framework, as a process of its own finds them.

    There a broken installation may fail in any way, and what a framework prints when it is loaded is not shown.
    """
    words = [sys.executable, "-c", PROGRAMS[framework]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"cannot be used: it is not loaded after {SECONDS} seconds"
    said = done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"]
    return f"cannot be used: {said[-1]}" if done.returncode else done.stdout.strip()


def _data() -> Iterator[str]:
    yield "split-mnist, permuted-mnist, split-mnist-vae: embedded; text-domains: text that comes with Python"
    folder = data_directory(None)
    if folder is None:
        yield f"{VARIABLE} is not set: CIFAR-100 and TinyImageNet are read from the Hugging Face hub"
        yield f"text-sentiment comes without data; name a folder by --data-dir or {VARIABLE}"
        return
    yield f"{VARIABLE} is {folder}{'' if folder.is_dir() else ', which is no folder'}"
    for benchmark, names in FOLDERS.items():
        there = [name for name in names if (Path(folder) / name).is_dir()]
        yield f"{benchmark}: {folder / there[0]}" if there else f"{benchmark}: there is no {folder / names[0]}"


def _missing() -> Iterator[str]:
    complete = True
    for extra, (packages, purpose) in EXTRAS.items():
        lacking = [name for name in packages if find_spec(name) is None]
        if lacking:
            complete = False
            yield f"{', '.join(lacking)} ({purpose}): pip install 'became[{extra}]'"
    if complete:
        yield "nothing"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of this checkout" if name == "became" else "is not installed"
