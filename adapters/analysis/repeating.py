"""The command that repeats a group's runs, found from their configuration and proved by resolving it again."""

import json
import shlex
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from adapters.analysis.groups import Group
from adapters.benchmarks.catalogue import find_benchmark
from adapters.cli.configuration import resolve
from adapters.cli.options import Options
from became_core import BecameError

__all__ = ["repeating_command"]

# Where a configuration keeps what an option of another name sets.
_PLACES = {
    "lr": ("stage1", "lr"),
    "epochs": ("stage1", "epochs"),
    "stage2_epochs": ("stage2", "epochs"),
    "optimiser": ("optimiser", "kind"),
    "momentum": ("optimiser", "momentum"),
    "weight_decay": ("optimiser", "weight_decay"),
    "head_rate": ("relative", "heads"),
    "norm_rate": ("relative", "norms"),
    "first_rate": ("relative", "first"),
    "path_points": ("path_alphas",),
    "augment": ("augmentation",),
}
# Options of which the configuration holds something else: (its value there) -> the option's.
_TURNED: dict[str, Callable[[Any], Any]] = {"path_points": len, "augment": lambda views: views is not None}
_ELSEWHERE = {
    "benchmark",
    "methods",
    "projector",
    "seeds",
    "preset",
    "data_dir",
    "device",
    "deterministic",
    "out",
    "dry_run",
    "resume",
    "tracker",
    "output",
}


def repeating_command(group: Group) -> str | None:
    """Return the shortest command that runs this configuration, None if today's options cannot express it."""
    commands = []
    first = group.runs[0]
    config, wanted = _through_json(first.config), json.dumps(first.config, sort_keys=True)
    try:
        for preset in find_benchmark(first.benchmark).presets:
            given: dict[str, Any] = {"benchmark": first.benchmark, "methods": (first.method,), "preset": preset}
            changes = _changes(_through_json(resolve(Options(**given)).record()), config)
            if json.dumps(resolve(Options(**given, **changes)).record(), sort_keys=True) == wanted:
                commands.append(_command(group, preset, changes))
    except (BecameError, TypeError, ValueError):
        return None
    return min(commands, key=len, default=None)


def _through_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as a file would give them back: tuples have become lists."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _changes(usual: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The options that lead from a preset's configuration to this one."""
    changes = {}
    for option in (field.name for field in fields(Options) if field.name not in _ELSEWHERE):
        place = _PLACES.get(option, (option,))
        ours, theirs = _at(usual, place), _at(config, place)
        absent = theirs is None and len(place) == 2  # as SGD's momentum is from Adam
        if ours != theirs and not absent:
            turned = _TURNED.get(option)
            changes[option] = turned(theirs) if turned is not None else 0 if theirs is None else theirs
    return changes


def _at(config: dict[str, Any], place: tuple[str, ...]) -> Any:
    value: Any = config
    for name in place:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _command(group: Group, preset: str, changes: dict[str, Any]) -> str:
    first = group.runs[0]
    backend = first.backend.rpartition("+")[2]
    words = ["python", "-m", f"adapters.{backend}.run", "--benchmark", first.benchmark, "--methods", first.method]
    words += ["--seeds", *(str(run.seed) for run in group.runs)]
    words += ["--preset", preset] if preset != Options().preset else []
    for option, value in changes.items():
        words += [f"--{option.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
