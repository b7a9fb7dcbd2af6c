"""Figures of finished runs; matplotlib is imported here and nowhere else.

Every ``plot_…`` takes a run, or several, and returns a matplotlib ``Figure``, for notebooks too.

Raises, when it is imported:
    BecameError: if matplotlib is missing.
"""

from importlib.util import find_spec

from became_core import BecameError

if find_spec("matplotlib") is None:
    raise BecameError("figures need matplotlib; pip install 'became[report]'.")

from adapters.analysis.figures.accuracy import (
    plot_accuracy_matrix,
    plot_accuracy_over_time,
    plot_epochs,
    plot_plasticity,
    plot_scores,
)
from adapters.analysis.figures.training import (
    plot_alpha,
    plot_learning_curves,
    plot_path,
    plot_ranks,
    plot_seconds,
)

__all__ = [
    "plot_accuracy_matrix",
    "plot_accuracy_over_time",
    "plot_alpha",
    "plot_epochs",
    "plot_learning_curves",
    "plot_path",
    "plot_plasticity",
    "plot_ranks",
    "plot_scores",
    "plot_seconds",
]
