"""Experiment trackers: a run's scalars, written by a package that is an extra, imported only when it is asked for."""

from adapters.tracking.tracker import TRACKERS, Tracker, Writer, open_writer

__all__ = ["TRACKERS", "Tracker", "Writer", "open_writer"]
