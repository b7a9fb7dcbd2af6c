"""Tables of several runs by one name, as ``reproduce.toml`` describes them, which lies beside this module.

Convention: a table is made of commands ``became run``, which can be entered one by one just as well. Tables share
folders, so what one has computed another takes as it is.
"""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from adapters.analysis.comparison import comparison, gather
from adapters.analysis.tables import FORMATS
from adapters.runs import read_results
from became_core import BecameError
from became_core.registry import nearest

__all__ = ["Reproduction", "reproductions"]


@dataclass(frozen=True)
class Reproduction:
    """A table, and the runs that it is made of.

    Attributes:
        title: what it compares, on which schedule.
        seeds: those of every run.
        runs: for each command, the name of its folder and its options, without seeds and without what says where.
    """

    title: str
    seeds: tuple[int, ...]
    runs: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def named(cls, name: str) -> Self:
        """Return a table by its name; raise a BecameError if there is none of that name."""
        known = _known()
        if name not in known:
            raise BecameError(f"there is no table '{name}'{nearest(name, known)}.")
        runs = tuple((run["folder"], tuple(run["options"])) for run in known[name]["runs"])
        return cls(known[name]["title"], tuple(known[name]["seeds"]), runs)

    def commands(self, out: Path, *others: str, seeds: tuple[int, ...] = ()) -> list[list[str]]:
        """Return the words of each command after ``became``.

        Args:
            out: the folder that the runs' folders are made in.
            others: options of every run, as ``--data-dir PATH``.
            seeds: other seeds than the table's own.

        Example:
            >>> [words] = Reproduction("", (0,), (("mnist", ("--first", "2")),)).commands(Path("runs"))
            >>> " ".join(words)
            'run --first 2 --seeds 0 --out runs/mnist'
        """
        numbers = [str(seed) for seed in seeds or self.seeds]
        shared = *others, "--seeds", *numbers
        return [["run", *options, *shared, "--out", str(out / folder)] for folder, options in self.runs]

    def compared(self, out: Path) -> str:
        """Return the tables of what has finished, a benchmark after the other, beside the published numbers.

        Folders that tables share are compared whole, with what another table has computed there.
        """
        groups: dict[tuple[str, object], list[Path]] = {}
        for folder, _ in self.runs:
            finished = read_results(out / folder) if (out / folder).is_dir() else []
            if finished:
                groups.setdefault((finished[0].benchmark, finished[0].config.get("tasks")), []).append(out / folder)
        return "\n".join(FORMATS["text"](comparison(gather(folders))) for folders in groups.values())


def reproductions() -> str:
    """Return the names of all tables with their titles, a line each."""
    known = _known()
    width = max(map(len, known))
    return "\n".join(f"{name:{width}}  {table['title']}" for name, table in known.items())


def _known() -> dict[str, Any]:
    tables: dict[str, Any] = tomllib.loads(files("adapters.cli").joinpath("reproduce.toml").read_text("utf-8"))[
        "tables"
    ]
    return tables
