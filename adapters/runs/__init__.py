"""Run directories: what a run leaves on disk."""

from adapters.runs.directory import RunDirectory, read_results, write_summary
from adapters.runs.results import RunResult, Scores

__all__ = ["RunDirectory", "RunResult", "Scores", "read_results", "write_summary"]
