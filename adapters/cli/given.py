"""A run's options as its ``config.json`` keeps them, and back again, for a command that goes on with it by itself.

Convention: an option that was left out is left out here. Where the data was and on which device the run was are apart,
as hints: they hold on the machine where it began, and the result depends on neither.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from adapters.cli.options import Options
from became_core import BecameError

__all__ = ["given", "options_of"]

# Of these the run's own name and folder tell, the hints do, or the next command does.
_APART = {"methods", "projector", "seeds", "data_dir", "device", "out", "dry_run", "resume", "output"}


def given(options: Options) -> dict[str, Any]:
    """Return what ``options_of`` needs, as plain values for JSON."""
    usual, names = Options(), [field.name for field in fields(Options) if field.name not in _APART]
    values = {name: getattr(options, name) for name in names if getattr(options, name) != getattr(usual, name)}
    data_dir = None if options.data_dir is None else str(options.data_dir.absolute())
    return {"options": values, "hints": {"data_dir": data_dir, "device": options.device}}


def options_of(config: Mapping[str, Any], file: Path) -> Options:
    """Return the options of one run, by the values of its ``config.json``; hints that do not hold are left out.

    Raises:
        BecameError: if they are not there, as in a file of before they were kept, or this version knows others.
    """
    try:
        options, hints = config["given"]["options"], config["given"]["hints"]
        method, seed = str(config["method"]), int(config["seed"])
    except (KeyError, TypeError, ValueError):
        raise BecameError(f"{file} does not say with which options it began; give the command that did.") from None
    unknown = set(options) - {field.name for field in fields(Options)}
    if unknown:
        raise BecameError(f"{file} has an option that there is not, {min(unknown)}; use the version that began it.")
    data_dir = None if hints["data_dir"] is None else Path(hints["data_dir"])
    values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in options.items()}
    values |= {"methods": (method,), "seeds": (seed,), "device": hints["device"]}
    there = data_dir if data_dir is not None and data_dir.exists() else None
    return Options(**values, data_dir=there, out=file.parents[1], resume=True)
