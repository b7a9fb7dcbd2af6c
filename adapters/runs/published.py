"""The published numbers of ``published.toml``, which lies beside this module so that an installed package has it too.

Convention: accuracies in percent, task-incremental; None for what a source does not give.
"""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

__all__ = ["PUBLISHED", "PublishedScores", "PublishedTable", "published_tables"]

PUBLISHED: dict[str, Any] = tomllib.loads(files("adapters.runs").joinpath("published.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class PublishedScores:
    """What a source says of a method."""

    acc: float
    bwt: float | None = None
    forgetting: float | None = None
    last_plasticity: float | None = None


@dataclass(frozen=True)
class PublishedTable:
    """One source's numbers on one benchmark.

    Attributes:
        source: where they stand.
        protocol: how they were trained; numbers of different protocols are not to be compared.
        methods: by name.
    """

    source: str
    protocol: str
    methods: dict[str, PublishedScores]


def published_tables(benchmark: str, tasks: int) -> list[PublishedTable]:
    """Return what has been published of a benchmark split into so many tasks, in the order of the file."""
    return [
        PublishedTable(
            PUBLISHED["sources"][table["source"]],
            PUBLISHED["protocols"][table["protocol"]],
            {name: PublishedScores(**scores) for name, scores in table["methods"].items()},
        )
        for table in PUBLISHED["tables"]
        if (table["benchmark"], table["tasks"]) == (benchmark, tasks)
    ]
