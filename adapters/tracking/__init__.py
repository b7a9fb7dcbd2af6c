"""Experiment trackers: the scalars of a run, written by a package that is an extra and imported only if it is used."""

from adapters.tracking.tracker import TRACKERS, Tracker, Writer, open_writer

__all__ = ["TRACKERS", "Tracker", "Writer", "open_writer"]
