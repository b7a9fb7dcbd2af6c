"""The Laplace-posterior mathematics: quadratics, precisions, the posterior, alpha*, merging rules and paths."""

from became_core.laplace.bezier import (
    BecameCurve,
    BezierPath,
    bezier_path,
    curve_minimiser,
    predicted_advantage,
    train_control,
)
from became_core.laplace.estimators import (
    Calibrated,
    DiagonalFisher,
    Estimator,
    LocalLoss,
    MergeSubspace,
    NativeExpansion,
    PaperClosedForm,
    Secant,
)
from became_core.laplace.expansion import layerwise_quadratic, path_quadratic, subspace_quadratic
from became_core.laplace.merge import combine, is_statistic, merge, optimal_alpha
from became_core.laplace.path import PathReport, TracedPath, compare, trace_path
from became_core.laplace.posterior import LaplacePosterior
from became_core.laplace.quadratic import Quadratic
from became_core.laplace.rules import Became, Equal, FisherMerge, Fixed, GridSearch, MeanIMM, Merged, MergeRule, ModeIMM
from became_core.precision import Dense, Diagonal, Isotropic, Kronecker, LowRank, Precision, Sum

__all__ = [
    "Became",
    "BecameCurve",
    "BezierPath",
    "Calibrated",
    "Dense",
    "Diagonal",
    "DiagonalFisher",
    "Equal",
    "Estimator",
    "FisherMerge",
    "Fixed",
    "GridSearch",
    "Isotropic",
    "Kronecker",
    "LaplacePosterior",
    "LocalLoss",
    "LowRank",
    "MeanIMM",
    "MergeRule",
    "MergeSubspace",
    "Merged",
    "ModeIMM",
    "NativeExpansion",
    "PaperClosedForm",
    "PathReport",
    "Precision",
    "Quadratic",
    "Secant",
    "Sum",
    "TracedPath",
    "bezier_path",
    "combine",
    "compare",
    "curve_minimiser",
    "is_statistic",
    "layerwise_quadratic",
    "merge",
    "optimal_alpha",
    "path_quadratic",
    "predicted_advantage",
    "subspace_quadratic",
    "trace_path",
    "train_control",
]
