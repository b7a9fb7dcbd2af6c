"""The Laplace-posterior mathematics: quadratics, precisions, the posterior, alpha* and merging."""

from became_core.laplace.merge import merge, optimal_alpha
from became_core.laplace.path import trace_path
from became_core.laplace.posterior import LaplacePosterior
from became_core.laplace.precision import Diagonal
from became_core.laplace.quadratic import Quadratic, path_quadratic
from became_core.laplace.rules import Calibrated, MergeRule, NewTask, Published

__all__ = [
    "Calibrated",
    "Diagonal",
    "LaplacePosterior",
    "MergeRule",
    "NewTask",
    "Published",
    "Quadratic",
    "merge",
    "optimal_alpha",
    "path_quadratic",
    "trace_path",
]
