"""``became list``: what there is to choose from, a line each, told by the registries and by the modules' own words."""

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Literal

from adapters.benchmarks import presets as of_presets
from adapters.benchmarks.catalogue import BENCHMARKS, Benchmark
from became_core.continual import METHODS, method_names
from became_core.projection import PROJECTORS

__all__ = ["KINDS", "Kind", "listed"]

Kind = Literal["benchmarks", "methods", "projectors", "presets"]


def benchmarks() -> dict[str, str]:
    """Return what each benchmark is."""
    return {name: _benchmark(benchmark) for name, benchmark in BENCHMARKS.items()}


def methods() -> dict[str, str]:
    """Return what each method does, by the first line of its recipe's docstring, or of the projector's."""
    return {name: (METHODS if name in METHODS else PROJECTORS).summary(name) for name in sorted(method_names())}


def projectors() -> dict[str, str]:
    """Return what each projector is, by the first line of its docstring."""
    return {name: PROJECTORS.summary(name) for name in PROJECTORS.names}


def presets() -> dict[str, str]:
    """Return where each preset is from, from the table of their module, and which benchmarks have it."""
    told: dict[str, str] = {}
    for name, source in _rows(of_presets):
        last = name.strip("`") or list(told)[-1]
        told[last] = f"{told.get(last, '')} {source}".strip()
    having = {name: [each.name for each in BENCHMARKS.values() if name in each.presets] for name in told}
    everywhere = len(BENCHMARKS)
    return {
        name: source if len(having[name]) == everywhere else f"{source} (for {', '.join(having[name])})"
        for name, source in told.items()
    }


KINDS: Mapping[Kind, Callable[[], dict[str, str]]] = {
    "benchmarks": benchmarks,
    "methods": methods,
    "projectors": projectors,
    "presets": presets,
}


def listed(kind: Kind | None) -> str:
    """Return the lines of one kind, or of all kinds, each under its name."""
    if kind is not None:
        return _lines(KINDS[kind]())
    return "\n\n".join(f"{name}:\n{textwrap.indent(_lines(tell()), '  ')}" for name, tell in KINDS.items())


def _lines(told: Mapping[str, str]) -> str:
    longest = max(map(len, told))
    return "\n".join(f"{name:{longest}}  {what}".rstrip() for name, what in told.items())


def _benchmark(benchmark: Benchmark) -> str:
    what = _first_line(benchmark.load).removeprefix("Return ").partition(":")[0]
    cut = "permutations of the pixels of" if benchmark.permuted else "groups of the classes of"
    return f"{benchmark.tasks} tasks, {cut} {what}; presets {', '.join(benchmark.presets)}"


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0].removesuffix(".")


def _rows(module: object) -> list[list[str]]:
    """The rows of the table in a module's docstring, the heading left out."""
    lines = re.findall(r"^\|(.*)\|$", inspect.getdoc(module) or "", re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
