"""The options that say what a command shows; those of every command that runs something."""

from dataclasses import dataclass
from typing import Literal

from adapters.cli.logs import Level
from adapters.cli.words import worded

__all__ = ["Output"]


@dataclass(frozen=True)
@worded
class Output:
    """What a command shows."""

    quiet: bool = False
    """Show errors and results alone."""
    log: Literal["text", "json"] = "text"
    """What standard output has: text, or an object of JSON a line for every event and result, and nothing else."""
    log_level: Level | None = None
    """What is told on standard error beside errors: warnings and what is graver, if not given; with --quiet nothing."""

    @property
    def level(self) -> Level:
        """The level of the log."""
        return self.log_level or ("error" if self.quiet else "warning")
