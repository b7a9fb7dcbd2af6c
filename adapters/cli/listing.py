"""``became list``: what there is to choose from, a line each, as the registries have it."""

import textwrap
from collections.abc import Callable, Mapping
from typing import Literal

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.presets import SOURCES
from adapters.networks import NETWORKS
from became_core.continual import METHODS, method_names
from became_core.projection import PROJECTORS

__all__ = ["KINDS", "Kind", "listed"]

Kind = Literal["benchmarks", "methods", "projectors", "networks", "presets"]


def presets() -> dict[str, str]:
    """Return where each preset is from, and which benchmarks have it unless all have."""
    having: dict[str, list[str]] = {}
    for name in BENCHMARKS.names:
        for preset in BENCHMARKS[name].presets:
            having.setdefault(preset, []).append(name)
    lines = {}
    for preset, benchmarks in having.items():
        where = "" if len(benchmarks) == len(BENCHMARKS.names) else f" (for {', '.join(benchmarks)})"
        lines[preset] = f"{SOURCES.get(preset, '')}{where}".strip()
    return lines


KINDS: Mapping[Kind, Callable[[], dict[str, str]]] = {
    "benchmarks": lambda: {name: BENCHMARKS[name].summary() for name in BENCHMARKS.names},
    "methods": lambda: {
        name: (METHODS if name in METHODS else PROJECTORS).summary(name) for name in sorted(method_names())
    },
    "projectors": lambda: {name: PROJECTORS.summary(name) for name in PROJECTORS.names},
    "networks": lambda: {name: NETWORKS.summary(name).removeprefix("Return ") for name in NETWORKS.names},
    "presets": presets,
}


def listed(kind: Kind | None, width: int) -> str:
    """Return the lines of one kind, or of all kinds, each under its name; what is wider goes on in further lines."""
    if kind is not None:
        return _lines(KINDS[kind](), "", width)
    return "\n\n".join(f"{name}:\n{_lines(entries(), '  ', width)}" for name, entries in KINDS.items())


def _lines(entries: Mapping[str, str], indent: str, width: int) -> str:
    longest = max(map(len, entries))
    hanging = " " * (len(indent) + longest + 2)
    lines = (f"{indent}{name:{longest}}  {text}" for name, text in entries.items())
    wrapper = textwrap.TextWrapper(width, subsequent_indent=hanging, break_on_hyphens=False)
    return "\n".join(map(wrapper.fill, lines))
