"""``became resume OUT``: which runs of a folder are unfinished, and with what each goes on."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

from adapters.cli.backend import Backend, BackendName
from adapters.cli.configuration import resolve
from adapters.cli.given import options_of
from adapters.cli.running import Job
from adapters.runs import RunDirectory
from adapters.runs.files import DamagedError, read_sealed
from became_core import BecameError

__all__ = ["unfinished"]


def unfinished(
    out: Path,
    load: Callable[[BackendName], Backend],
    *,
    backend: BackendName | None = None,
    data_dir: Path | None = None,
    device: str | None = None,
) -> list[Job]:
    """Return the runs of a folder that have begun, or were to, and have no results.

    Args:
        out: a folder that --out named.
        load: returns a backend by its name; called once for each that is needed.
        backend: what they go on with; each with the one that was last at work on it if None.
        data_dir: where the data is; where it was, if that is still there, if None.
        device: where to compute; where it was, or, on another backend, "auto", if None.

    Raises:
        BecameError: if there are none, or a file does not say how it began.
    """
    files = sorted(out.glob("*/config.json"))
    if not files:
        raise BecameError(f"{out} holds no runs; give a folder that --out named.")
    load = cache(load)
    jobs = []
    for file in files:
        if (file.parent / "results.json").exists():
            continue
        try:
            config = read_sealed(file)
        except DamagedError:
            raise BecameError(f"{file} is damaged; move {file.parent} away.") from None
        options = options_of(config, file)
        last = str(config["backend"]).rpartition("+")[2]
        name = backend or last
        if name not in get_args(BackendName):
            raise BecameError(f"{file} is of a run on {name}; say with --backend what it is to go on with.")
        usual = options.device if name == last else "auto"
        options = replace(options, data_dir=data_dir or options.data_dir, device=device or usual)
        run = RunDirectory(out, options.methods[0], options.seeds[0])
        jobs.append(Job(run, load(name), options, resolve(options)))
    if not jobs:
        raise BecameError(f"all runs in {out} are finished; there is nothing to resume.")
    for each in {id(job.backend): job.backend for job in jobs if job.options.deterministic}.values():
        each.repeat_exactly()
    return jobs
