"""Run directories: what a run leaves on disk, and what it goes on from."""

from adapters.runs.checkpoints import Checkpoints
from adapters.runs.directory import RunDirectory, finished_runs, read_results, write_summary
from adapters.runs.results import RunResult, Scores

__all__ = ["Checkpoints", "RunDirectory", "RunResult", "Scores", "finished_runs", "read_results", "write_summary"]
