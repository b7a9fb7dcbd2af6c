"""The Laplace-posterior mathematics: quadratics, precisions, the posterior, alpha* and merging."""

from became_core.laplace.base import Precision
from became_core.laplace.dense import Dense
from became_core.laplace.kronecker import Kronecker
from became_core.laplace.low_rank import LowRank
from became_core.laplace.merge import merge, optimal_alpha
from became_core.laplace.path import trace_path
from became_core.laplace.posterior import LaplacePosterior
from became_core.laplace.precision import Diagonal, Isotropic
from became_core.laplace.quadratic import Quadratic, path_quadratic
from became_core.laplace.rules import Calibrated, MergeRule, NewTask, Published
from became_core.laplace.sums import Sum

__all__ = [
    "Calibrated",
    "Dense",
    "Diagonal",
    "Isotropic",
    "Kronecker",
    "LaplacePosterior",
    "LowRank",
    "MergeRule",
    "NewTask",
    "Precision",
    "Published",
    "Quadratic",
    "Sum",
    "merge",
    "optimal_alpha",
    "path_quadratic",
    "trace_path",
]
