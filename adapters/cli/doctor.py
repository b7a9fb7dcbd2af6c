"""``became doctor``: what this installation has, what it lacks, and the command that installs that.

It needs no framework. What cannot be imported is a line of the report and not an error.
"""

import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module
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
    "transformers": (("transformers",), "--network hf:NAME"),
    "dask": (("distributed",), "--scheduler"),
    "flower": (("flwr",), "adapters.flower, federations"),
}
ALWAYS = ("became", "numpy", "array-api-compat", "optree", "safetensors", "tyro", "rich", "datasets")
# By benchmark, the folder of its images within a folder of data.
FOLDERS = {
    "split-cifar100": ("uoft-cs/cifar100",),
    "split-tinyimagenet": ("zh-plus/tiny-imagenet", "tiny-imagenet-200"),
    "split-miniimagenet": ("mini-imagenet",),
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
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else TensorFlow reports on the processor
    installed = [name for name in BACKENDS if find_spec(name) is not None]
    if not installed:
        yield f"none; pip install 'became[{BACKENDS[0]}]', or with {' or '.join(BACKENDS[1:])} in its place"
    for name in installed:
        try:
            yield f"{name} {import_module(name).__version__}: {_devices(name)}"
        except Exception as error:  # a broken installation may fail in any way
            yield f"{name}: it cannot be used ({type(error).__name__}: {error})"


def _devices(framework: str) -> str:
    """Return the devices that a framework finds, as it calls them."""
    module = import_module(framework)
    if framework == "torch":
        names = ["cpu", *(f"cuda:{number}" for number in range(module.cuda.device_count()))]
        threads = module.get_num_threads()
        return f"{', '.join(names)}; {threads} thread{'' if threads == 1 else 's'} unless told otherwise"
    devices = module.devices() if framework == "jax" else module.config.list_logical_devices()
    return ", ".join(str(getattr(device, "name", device)) for device in devices)


def _data() -> Iterator[str]:
    yield "split-mnist, permuted-mnist: embedded"
    folder = data_directory(None)
    if folder is None:
        yield f"{VARIABLE} is not set: CIFAR-100 and TinyImageNet are read from the Hugging Face hub"
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
