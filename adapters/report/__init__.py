"""Figures and a page of finished runs; matplotlib is imported here and nowhere else.

Every ``plot_…`` takes a run, or several, and returns a matplotlib ``Figure``, for notebooks too.
"""

from adapters.report.accuracy import plot_accuracy_matrix, plot_accuracy_over_time, plot_scores
from adapters.report.cost import plot_ranks, plot_seconds
from adapters.report.merging import plot_alpha, plot_path

__all__ = [
    "plot_accuracy_matrix",
    "plot_accuracy_over_time",
    "plot_alpha",
    "plot_path",
    "plot_ranks",
    "plot_scores",
    "plot_seconds",
]
