"""The Laplace-posterior mathematics: quadratics, precisions, the posterior, alpha*, merging rules and paths."""

from became_core.laplace.bezier import BezierPath, bezier_path, predicted_advantage, train_control
from became_core.laplace.estimators import (
    AsKnown,
    Calibrated,
    Diagonals,
    Estimator,
    Frame,
    LocalLoss,
    Published,
    Secant,
)
from became_core.laplace.expansion import layerwise_quadratic, path_quadratic, subspace_quadratic
from became_core.laplace.merge import combine, merge, optimal_alpha
from became_core.laplace.path import PathReport, TracedPath, compare, trace_path
from became_core.laplace.posterior import LaplacePosterior
from became_core.laplace.precision import Dense, Diagonal, Isotropic, Kronecker, LowRank, Precision, Sum
from became_core.laplace.quadratic import Quadratic
from became_core.laplace.rules import Became, Equal, FisherMerge, Fixed, GridSearch, MeanIMM, Merged, MergeRule, ModeIMM

__all__ = [
    "AsKnown",
    "Became",
    "BezierPath",
    "Calibrated",
    "Dense",
    "Diagonal",
    "Diagonals",
    "Equal",
    "Estimator",
    "FisherMerge",
    "Fixed",
    "Frame",
    "GridSearch",
    "Isotropic",
    "Kronecker",
    "LaplacePosterior",
    "LocalLoss",
    "LowRank",
    "MeanIMM",
    "MergeRule",
    "Merged",
    "ModeIMM",
    "PathReport",
    "Precision",
    "Published",
    "Quadratic",
    "Secant",
    "Sum",
    "TracedPath",
    "bezier_path",
    "combine",
    "compare",
    "layerwise_quadratic",
    "merge",
    "optimal_alpha",
    "path_quadratic",
    "predicted_advantage",
    "subspace_quadratic",
    "trace_path",
    "train_control",
]
