"""Run directories: what a run leaves on disk."""

from adapters.runs.directory import RunDirectory, write_summary
from adapters.runs.results import RunResult, Scores

__all__ = ["RunDirectory", "RunResult", "Scores", "write_summary"]
