"""The command that repeats runs: what their configuration has that a preset does not give.

Convention: a command is a list of words, or one text that a shell takes apart into these words.
"""

import shlex
from collections.abc import Sequence

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.runs.configuration import Configuration
from adapters.runs.options import options
from adapters.runs.results import RunResult
from became_core import BecameError

__all__ = ["command_words", "repeating_command"]


def command_words(configuration: Configuration, method: str, preset: str | None = None) -> list[str]:
    """Return the words on the command line that give a configuration: its difference to a preset, hints included.

    >>> command_words(Configuration.of({"lr": 0.2}, "gpm"), "gpm")
    ['--benchmark', 'split-mnist', '--lr', '0.2']

    Args:
        configuration: of a run.
        method: of the run, METHOD or METHOD+PROJECTOR.
        preset: from which the difference is taken; the benchmark's usual one if None.

    Raises:
        BecameError: if no words can give it, or there is no such preset.
    """
    known, values = options(), {**vars(configuration), **configuration.settings}
    # The number of tasks comes first: it may decide on the preset, and on how many tasks are learned.
    start = {"benchmark": configuration.benchmark, "tasks": configuration.tasks}
    usual = Configuration.of(start, method, preset)
    before = {**vars(usual), **usual.settings, "benchmark": None, "tasks": BENCHMARKS[configuration.benchmark].tasks}
    words = ["--preset", preset] if preset not in (None, BENCHMARKS[configuration.benchmark].usual) else []
    for name, option in known.items():
        if name in values and values[name] != before[name]:
            words += option.words(values[name])
    return words


def repeating_command(runs: Sequence[RunResult]) -> str | None:
    """Return the shortest command that repeats these runs, which differ in their seeds; None if no command can."""
    run = runs[0]
    start = ["became", "run", "--backend", run.backend.rpartition("+")[2]]
    start += ["--methods", run.method, "--seeds", *(str(run.seed) for run in runs)]
    end = ["--data-dir", run.data_dir] if run.data_dir is not None else []
    try:
        configuration = Configuration.from_json(run.config, run.method)
        benchmark = BENCHMARKS[configuration.benchmark]
    except (BecameError, TypeError, ValueError):
        return None
    commands = []
    for preset in benchmark.presets:
        try:
            words = command_words(configuration, run.method, preset)
        except (BecameError, TypeError, ValueError):
            continue  # not every preset can be turned into this configuration, and another one may
        commands.append(shlex.join([*start, *words, *end]))
    return min(commands, key=len, default=None)
